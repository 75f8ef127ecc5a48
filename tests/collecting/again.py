"""Models in which module `a` runs more than once in a forward pass, each by another way that code can take."""

import functools
import operator
from contextlib import nullcontext

import torch
from torch import nn

AGAIN: list[type[nn.Module]] = []


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(2, 2) for _ in range(3))


def again(cls):
    AGAIN.append(cls)
    return cls


@again
class InOneExpression(Parts):
    def forward(self, x):
        return self.a(x) + self.a(-x)


@again
class AfterAnother(Parts):
    def forward(self, x):
        x = self.a(x)
        x = self.b(x)
        return self.a(x)


@again
class InALoop(Parts):
    def forward(self, x):
        for _ in range(3):
            x = self.a(x)
        return x


@again
class InALoopOverTensors(Parts):
    def forward(self, x):
        return torch.stack([self.a(row) for row in x])


@again
class InAWhileLoop(Parts):
    def forward(self, x):
        steps = 0
        while steps < 3:
            x, steps = self.a(x), steps + 1
        return x


@again
class InAGenerator(Parts):
    def forward(self, x):
        return sum(self.a(x * scale) for scale in (1, 2))


@again
class InAGeneratorFunction(Parts):
    def parts(self, x):
        yield self.a(x)
        yield self.b(x)
        yield self.a(-x)

    def forward(self, x):
        return sum(self.parts(x))


@again
class ByMap(Parts):
    def forward(self, x):
        return torch.stack(list(map(self.a, x.split(1))))


@again
class ByStarmap(Parts):
    def forward(self, x):
        apply = functools.partial(self.a)
        return apply(x) + apply(-x)


@again
class ByLambda(Parts):
    def forward(self, x):
        run = lambda value: self.a(value)  # noqa: E731
        return run(x) + self.b(run(-x))


@again
class ByClosure(Parts):
    def forward(self, x):
        def run(value):
            return self.a(value)

        return self.b(run(x)) + run(-x)


@again
class ByAlias(Parts):
    def forward(self, x):
        first = second = self.a
        return self.b(first(x)) + second(-x)


@again
class ByAliasOfAMethod(Parts):
    def forward(self, x):
        first, second = self.a, self.a.forward
        return self.b(first(x)) + self.other(second, x)

    def other(self, run, x):
        return run(x) + self.a(x)


@again
class UnderTwoNames(Parts):
    def __init__(self):
        super().__init__()
        self.twin = self.a

    def forward(self, x):
        return self.twin(self.b(self.a(x)))


@again
class InsideASharedBranch(Parts):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(self.a, nn.ReLU())

    def forward(self, x):
        return self.branch(x) - self.branch(-x)


@again
class InTwoBranches(Parts):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Sequential(self.a, self.b), nn.Sequential(self.a, self.c)

    def forward(self, x):
        return self.left(x) - self.right(x)


@again
class TwiceInASequential(nn.Sequential):
    def __init__(self):
        a = nn.Linear(2, 2)
        super().__init__()
        self.a, self.b, self.again = a, nn.ReLU(), a


@again
class SequentialOverTwice(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.ReLU()

    def forward(self, x):
        return super().forward(super().forward(x))


@again
class BySuper(InOneExpression):
    def forward(self, x):
        return super().forward(x) + super().forward(x)


@again
class AfterTheCallOfSuper(AfterAnother):
    def forward(self, x):
        return self.a(super().forward(x))


@again
class ByGetattr(Parts):
    def forward(self, x):
        for name in ("a", "b", "a"):
            x = getattr(self, name)(x)
        return x


@again
class ByGetSubmodule(Parts):
    def forward(self, x):
        x = self.a(x)
        return self.get_submodule("a")(x)


@again
class ByAttrgetter(Parts):
    def forward(self, x):
        x = self.a(x)
        return operator.attrgetter("a")(self)(x)


@again
class ByMethodcaller(Parts):
    def forward(self, x):
        x = self.a(x)
        return operator.methodcaller("once_more", x)(self)

    def once_more(self, x):
        return self.a(x)


@again
class ByChildren(Parts):
    def forward(self, x):
        x = self.a(x)
        for child in self.children():
            x = child(x)
        return x


@again
class ByModulesItself(Parts):
    def forward(self, x):
        x = self.a(x)
        return self._modules["a"](x)


@again
class ByVars(Parts):
    def forward(self, x):
        x = self.a(x)
        return vars(self)["_modules"]["a"](x)


@again
class ByAList(Parts):
    def __init__(self):
        super().__init__()
        self.order = [self.a, self.b, self.a]

    def forward(self, x):
        for module in self.order:
            x = module(x)
        return x


@again
class ByAListOfThunks(Parts):
    def forward(self, x):
        for step in [lambda v: self.a(v), lambda v: self.b(v), lambda v: self.a(v)]:
            x = step(x)
        return x


@again
class ByADictOfBoundMethods(Parts):
    def forward(self, x):
        steps = {"one": self.first, "two": self.second}
        for step in steps.values():
            x = step(x)
        return x

    def first(self, x):
        return self.a(x)

    def second(self, x):
        return self.b(self.a(x))


@again
class ByAModuleListTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.layers = nn.ModuleList([self.a, nn.ReLU()])

    def forward(self, x):
        for _ in range(2):
            for layer in self.layers:
                x = layer(x)
        return x


@again
class ByAModuleListAndThenItsFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.layers = nn.ModuleList([self.a, nn.ReLU()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.layers[0](x)


@again
class ByAReversedList(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.layers = nn.ModuleList([self.a, nn.ReLU()])

    def forward(self, x):
        for layer in (*self.layers, *reversed(self.layers)):
            x = layer(x)
        return x


@again
class ByAMethodTwice(Parts):
    def encode(self, x):
        return self.b(self.a(x))

    def forward(self, x):
        return self.encode(x) - self.encode(-x)


@again
class ByAMethodLater(Parts):
    def finish(self, x):
        return self.more(x)

    def more(self, x):
        return self.a(x)

    def forward(self, x):
        x = self.a(x)
        return self.finish(x)


@again
class ByAProperty(Parts):
    @property
    def last(self):
        return self.a

    def forward(self, x):
        return self.last(self.a(x))


@again
class ByRecursion(Parts):
    def forward(self, x, depth=2):
        x = self.a(x)
        return x if depth == 0 else self.forward(x, depth - 1)


@again
class ByFinally(Parts):
    def forward(self, x):
        try:
            return self.a(x)
        finally:
            self.seen = self.a(-x)


@again
class ByElse(Parts):
    def forward(self, x):
        try:
            x = self.a(x)
        except ValueError:
            return x
        else:
            x = self.a(x)
        return x


@again
class ByWith(Parts):
    def forward(self, x):
        with nullcontext(self.a) as run:
            x = self.a(x)
            return run(x)
