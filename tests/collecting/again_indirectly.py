"""More models in which module `a` runs more than once: by helpers, hooks, containers, and what Python itself calls."""

import functools
import itertools
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.collecting.again import Parts, again


@again
class ByWalrus(Parts):
    def forward(self, x):
        return y if (y := self.a(x)).sum() > 1e9 else self.a(y)


@again
class ByMatch(Parts):
    def forward(self, x):
        match self.a(x):
            case torch.Tensor() as y:
                return self.a(y)


@again
class ByDefaultArgument(Parts):
    def __init__(self):
        super().__init__()
        a = self.a

        def run(x, module=a):
            return module(x)

        self.run = run

    def forward(self, x):
        x = self.a(x)
        return self.run(x)


@again
class ByGlobal(Parts):
    def forward(self, x):
        global held
        held = self.a
        x = self.a(x)
        return held(x)


@again
class ByModuleFunction(Parts):
    def forward(self, x):
        return run_twice(self, x)


def run_twice(model, x):
    x = model.a(x)
    return model.a(x)


@again
class ByHelperWithTheModule(Parts):
    def forward(self, x):
        x = self.a(x)
        return apply_to(self, x)


def apply_to(owner, x):
    return owner.a(x)


@again
class ByReduce(Parts):
    def forward(self, x):
        return functools.reduce(lambda value, module: module(value), [self.a, self.b, self.a], x)


@again
class ByCheckpointTwice(Parts):
    def forward(self, x):
        x = checkpoint(self.a, x, use_reentrant=False)
        return checkpoint(self.a, x, use_reentrant=False)


@again
class ByDecorator(Parts):
    @staticmethod
    def twice(function):
        @functools.wraps(function)
        def run(self, x):
            return function(self, function(self, x))

        return run

    def forward(self, x):
        return self.step(x)

    def step(self, x):
        return self.b(self.a(x))

    step = twice(step)


@again
class ByCallOfItsOwn(Parts):
    def __call__(self, x):
        return super().__call__(super().__call__(x))

    def forward(self, x):
        return self.b(self.a(x))


@again
class ByAParent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = ByAMethodLaterOnce()
        self.a = self.inner.a

    def forward(self, x):
        return self.inner(self.inner(x))


class ByAMethodLaterOnce(Parts):
    def forward(self, x):
        return self.b(self.a(x))


@again
class ByACallbackOfThePartThatRan(Parts):
    def __init__(self):
        super().__init__()
        self.b = Calls(self.a)

    def forward(self, x):
        return self.b(self.a(x))


class Calls(nn.Module):
    def __init__(self, other):
        super().__init__()
        object.__setattr__(self, "other", other)

    def forward(self, x):
        return self.other(x)


@again
class ByAHookOfAnother(Parts):
    def __init__(self):
        super().__init__()
        self.b.register_forward_hook(lambda module, args, output: self.a(output))

    def forward(self, x):
        return self.b(self.a(x))


@again
class ByItsOwnHook(Parts):
    def __init__(self):
        super().__init__()
        self.deeper = True
        self.a.register_forward_hook(self.once_more)

    def once_more(self, module, args, output):
        if self.deeper:
            self.deeper = False
            output = module(output)
            self.deeper = True
        return output

    def forward(self, x):
        return self.b(self.a(x))


@again
class ByAHookOfTheModel(Parts):
    def __init__(self):
        super().__init__()
        self.register_forward_hook(lambda module, args, output: module.a(output))

    def forward(self, x):
        return self.a(x)


@again
class ByAPatchedForward(Parts):
    def __init__(self):
        super().__init__()
        inner = self.b.forward
        self.b.forward = lambda x: self.a(inner(x))

    def forward(self, x):
        return self.b(self.a(x))


class Helper:
    """A plain object that knows a module."""

    def __init__(self, module):
        self.module = module

    def finish(self, x):
        return self.module(x)


@again
class ByAPlainObject(Parts):
    def __init__(self):
        super().__init__()
        self.helper = Helper(self.a)

    def forward(self, x):
        x = self.a(x)
        return self.helper.finish(x)


@again
class ByAPlainObjectOfASibling(Parts):
    def __init__(self):
        super().__init__()
        self.b.helper = Helper(self.a)
        self.b.forward = lambda x: x

    def forward(self, x):
        x = self.a(x)
        b = self.b
        return b.helper.finish(x)


@again
class ByAStoredPartial(Parts):
    def __init__(self):
        super().__init__()
        self.run = functools.partial(apply_to, self)

    def forward(self, x):
        x = self.a(x)
        return self.run(x)


@again
class ByALocalObject(Parts):
    def forward(self, x):
        helper = Helper(self)
        x = self.a(x)
        return helper.module.a(x)


@again
class ByADynamicAttribute(Parts):
    def __getattr__(self, name):
        return super().__getattr__("a" if name == "encoder" else name)

    def forward(self, x):
        x = self.a(x)
        return self.encoder(x)


class Twice(nn.ModuleList):
    def __iter__(self):
        yield from super().__iter__()
        yield from super().__iter__()


@again
class ByAListThatGoesOverTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.layers = Twice([self.a, nn.ReLU()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@again
class ByAChain(Parts):
    def forward(self, x):
        for layer in itertools.chain([self.a, self.b], [self.a]):
            x = layer(x)
        return x


@again
class ByZip(Parts):
    def forward(self, x):
        for layer, scale in zip([self.a, self.b, self.a], (1, 2, 3), strict=True):
            x = layer(x) * scale
        return x


@again
class ByASetOfNames(Parts):
    def forward(self, x):
        for name, layer in {"one": self.a, "two": self.b, "three": self.a}.items():
            x = layer(x) * len(name)
        return x


class UsesAGlobal(nn.Module):
    def forward(self, x):
        return relay(x)


def relay(x):
    return keeper.module(x)


keeper = Helper(None)


@again
class ByAGlobalOfASibling(Parts):
    def __init__(self):
        super().__init__()
        self.b = UsesAGlobal()

    def forward(self, x):
        keeper.module = self.a
        return self.b(self.a(x))


@again
class ByAnEarlierOperand(Parts):
    def forward(self, x):
        return call_both(self.a, self.a(x))


def call_both(run, x):
    return run(x)


@again
class ByAConditionalExpression(Parts):
    def forward(self, x):
        return self.a(x) if self.a(x).sum() < 1e9 else x


@again
class ByACachedProperty(Parts):
    @functools.cached_property
    def last(self):
        return [self.a]

    def forward(self, x):
        x = self.a(x)
        return self.last[0](x)


@again
class BySetattr(Parts):
    def __setattr__(self, name, value):
        super().__setattr__(name, self.a(value) if name == "state" else value)

    def forward(self, x):
        self.state = self.a(x)
        return self.state


@again
class BySubscript(Parts):
    def __getitem__(self, index):
        return [self.a, self.b][index]

    def forward(self, x):
        x = self.a(x)
        return self[0](x)


@again
class ByAnOperator(Parts):
    def __matmul__(self, x):
        return self.a(x)

    def forward(self, x):
        x = self.a(x)
        return self @ x


@again
class ByANamespace(Parts):
    def __init__(self):
        super().__init__()
        self.kept = SimpleNamespace(run=self.a)

    def forward(self, x):
        x = self.a(x)
        return self.kept.run(x)
