"""Outputs: the activation is found and replaced in its place, in any container, or the part is asked for."""

import collections
import copy
import dataclasses
import functools
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Mapping, MutableMapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from actsteer import OutputError, Steerer, SteeringVector, record
from actsteer.sites.axes import Layout
from actsteer.sites.containers import Arguments, get, locate, put
from actsteer.sites.lens import Lens
from actsteer.sites.place import Place

Named = namedtuple("Named", ["hidden", "cache"])
OLD, NEW, REST = torch.zeros(2), torch.ones(2), torch.full((2,), 7.0)
IMAGE = torch.zeros(1, 2, 3)


@dataclasses.dataclass
class Output:
    hidden: Any
    cache: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    hidden: Any
    cache: Any = None


class MyList(list):
    """A user's own list."""


class MyDict(dict):
    """A user's own dict."""


def place(suffix="", *, side="out", module=None):
    path = tuple(filter(None, suffix.split(".")))
    site = ".".join([f"2:{side}", *path]) if path or side == "in" else "2"
    return Place(site, "2", module or nn.Identity(), side, path)


def model_output(**fields):
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return BaseModelOutputWithPast(**fields)


OUTPUTS = {
    "tensor": (OLD, ()),
    "tuple": ((OLD, IMAGE), (0,)),
    "tuple of one": ((OLD,), (0,)),
    "list": ([OLD, IMAGE, None], (0,)),
    "list of a subclass": (MyList([OLD, None]), (0,)),
    "named tuple": (Named(OLD, IMAGE), (0,)),
    "named tuple with None": (Named(None, OLD), (1,)),
    "torch's named tuple": (torch.return_types.max([OLD, torch.zeros(2, dtype=torch.int64)]), (0,)),
    "packed sequence": (pack_sequence([torch.zeros(2, 3)]), (0,)),
    "dict": ({"hidden": OLD, "cache": None}, ("hidden",)),
    "dict of a subclass": (MyDict(hidden=OLD), ("hidden",)),
    "ordered dict": (OrderedDict(hidden=OLD, cache=IMAGE), ("hidden",)),
    "default dict": (defaultdict(list, hidden=OLD), ("hidden",)),
    "user dict": (collections.UserDict(hidden=OLD), ("hidden",)),
    "keys that are no words": ({0: OLD}, (0,)),
    "dataclass": (Output(OLD, [1]), ("hidden",)),
    "frozen dataclass": (Frozen(OLD, [1]), ("hidden",)),
    "model output": (model_output(last_hidden_state=OLD), ("last_hidden_state",)),
    "after None": ((None, OLD), (1,)),
    "after a loss": ((torch.tensor(0.5), OLD), (1,)),
    "a loss among the fields": ({"loss": torch.tensor(0.5), "logits": OLD}, ("logits",)),
    "after indices": ((torch.zeros(2, dtype=torch.int64), OLD), (1,)),
}
by_kind = pytest.mark.parametrize(("output", "keys"), OUTPUTS.values(), ids=OUTPUTS.keys())


def parts(value):
    """Every (key, member) but the tensors' own."""
    if dataclasses.is_dataclass(value) and not isinstance(value, dict):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(value.items()) if hasattr(value, "items") else dict(enumerate(value))


@by_kind
@pytest.mark.case(18, 20)
def test_what_is_written_is_read_and_the_rest_stays(output, keys):
    found = locate(place(), output)
    assert found == keys
    assert get(output, found) is (OLD if not isinstance(output, PackedSequence) else output.data)
    written = put(output, found, NEW)
    assert type(written) is type(output)
    assert get(written, found) is NEW
    if keys:
        before, after = parts(output), parts(written)
        assert list(before) == list(after)
        assert all(after[key] is before[key] for key in before if key not in (keys[0], "data"))


@by_kind
@pytest.mark.case(20)
def test_what_came_in_is_never_changed(output, keys):
    activation = get(output, keys)
    put(output, keys, NEW)
    assert get(output, keys) is activation
    assert locate(place(), put(output, keys, NEW)) == keys


@pytest.mark.parametrize(
    ("output", "suffix", "keys"),
    [
        (Named(OLD, REST), "cache", (1,)),
        (Named(OLD, REST), "1", (1,)),
        ((OLD, (REST, NEW)), "1.0", (1, 0)),
        ({"a": [OLD, {"b": REST}]}, "a.1.b", ("a", 1, "b")),
        ({"a": [None, REST]}, "a", ("a", 1)),
        ({"0": OLD, "1": REST}, "1", ("1",)),
        (Output(OLD, Frozen(REST)), "cache.hidden", ("cache", "hidden")),
        (Output(OLD, Frozen(REST)), "cache", ("cache", "hidden")),
        (pack_sequence([torch.zeros(2, 3)]), "data", (0,)),
        ((OLD, pack_sequence([torch.zeros(2, 3)])), "1", (1, 0)),
        (model_output(last_hidden_state=OLD, hidden_states=(OLD, REST)), "hidden_states.1", ("hidden_states", 1)),
        (torch.zeros(1, 3).sort(), "values", (0,)),
    ],
    ids=str,
)
@pytest.mark.case(18, 20)
def test_the_keys_of_a_part_lead_to_it(output, suffix, keys):
    found = locate(place(suffix), output)
    assert found == keys
    written = put(output, found, NEW)
    assert get(written, found) is NEW
    assert type(written) is type(output)


AMBIGUOUS = {
    "tuple": ((OLD, REST), ["2:out.0", "2:out.1"]),
    "dict": ({"a": OLD, "b": REST}, ["2:out.a", "2:out.b"]),
    "not the first": ((None, OLD, IMAGE), ["2:out.1", "2:out.2"]),
    "dataclass": (Output(OLD, REST), ["2:out.hidden", "2:out.cache"]),
    "named tuple": (Named(OLD, REST), ["2:out.0", "2:out.1"]),
    "logits and states": (
        model_output(last_hidden_state=OLD) | {"x": REST},
        ["2:out.last_hidden_state", "2:out.x"],
    ),
}


@pytest.mark.parametrize(("output", "named"), AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
@pytest.mark.case(18, 20)
def test_several_that_could_be_meant_are_asked_about_and_each_answer_works(output, named):
    with pytest.raises(OutputError, match=r"site '2': .* holds several activations; name the one") as caught:
        locate(place(), output)
    assert str(named) in str(caught.value)
    for site in named:
        keys = locate(place(site.removeprefix("2:out.")), output)
        assert get(put(output, keys, NEW), keys) is NEW


def test_an_ambiguity_further_in_is_asked_about_with_the_whole_way():
    output = (IMAGE, (OLD, REST))
    with pytest.raises(OutputError, match=r"one of \['2:out\.1\.0', '2:out\.1\.1'\]"):
        locate(place("1"), output)
    assert locate(place("1.0"), output) == (1, 0)


@pytest.mark.case(19)
def test_the_outputs_of_torch_s_own_modules_can_be_read():
    pool = nn.MaxPool1d(1, return_indices=True)(torch.zeros(1, 2, 3))
    assert locate(place(), pool) == (0,)
    x = torch.zeros(4, 1, 2)
    assert locate(place(), nn.MultiheadAttention(2, 1, batch_first=True)(x, x, x, need_weights=False)) == (0,)
    out, (hidden, cell) = nn.LSTM(2, 3)(x)
    assert locate(place(), (out, (hidden, cell))) == (0,)
    assert locate(place("1.1"), (out, (hidden, cell))) == (1, 1)


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (None, "NoneType"),
        ((), "tuple"),
        ([], "list"),
        ({}, "dict"),
        (((OLD,),), r"tuple \(0: tuple\)"),
        ({"a": {"b": OLD}}, r"dict \(a: dict\)"),
        (torch.tensor([1, 2]), "int64"),
        ((torch.tensor(1.0),), r"tuple \(0: Tensor\)"),
        (Output(None), r"Output \(hidden: NoneType, cache: NoneType\)"),
        ("text", "str"),
    ],
    ids=str,
)
def test_an_output_without_an_activation_is_refused(output, kind):
    with pytest.raises(OutputError, match=rf"site '2': expected .*floating .*, got .*{kind}"):
        locate(place(), output)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_an_activation_that_is_not_floating_is_refused(dtype):
    for output, path in ((OLD.to(dtype), ""), ((OLD.to(dtype), OLD), "0")):
        with pytest.raises(OutputError, match=rf"expected floating activations, got {dtype}"):
            locate(place(path), output)


@pytest.mark.parametrize(
    ("output", "suffix", "there"),
    [((OLD, REST), "2", r"\['0', '1'\]"), ({"a": OLD}, "b", r"\['a'\]"), (Output(OLD), "x", r"\['hidden'\]")],
)
def test_a_part_that_is_missing_is_named_with_those_that_are_there(output, suffix, there):
    with pytest.raises(OutputError, match=rf"site '2:out.{suffix}': .* has no part '{suffix}'; there are {there}"):
        locate(place(suffix), output)


# --- a property of every container -----------------------------------------------------------------------------------
keys_ = st.text("abc_", min_size=1, max_size=3)
leaves = st.sampled_from([None, 3, "text"]) | st.integers(1, 3).map(lambda n: torch.arange(float(n)))


def containers(inner):
    return st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(MyList),
        st.tuples(inner, inner).map(lambda pair: Named(*pair)),
        st.dictionaries(keys_, inner, max_size=3),
        st.dictionaries(keys_, inner, max_size=3).map(OrderedDict),
        st.tuples(inner, inner).map(lambda pair: Output(*pair)),
        st.tuples(inner, inner).map(lambda pair: Frozen(*pair)),
    )


def paths(value, path=()):
    """Every path to a floating tensor, found independently of the code under test."""
    if isinstance(value, Tensor):
        yield path
    elif isinstance(value, list | tuple):
        for index, member in enumerate(value):
            yield from paths(member, (*path, index))
    elif isinstance(value, dict):
        for key, member in value.items():
            yield from paths(member, (*path, key))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from paths(getattr(value, field.name), (*path, field.name))


def flat(value):
    """The value with every tensor replaced by its identity, and every container by its type and members."""
    if isinstance(value, Tensor):
        return id(value)
    if isinstance(value, list | tuple):
        return type(value), tuple(map(flat, value))
    if isinstance(value, dict):
        return type(value), tuple((key, flat(member)) for key, member in value.items())
    if dataclasses.is_dataclass(value):
        return type(value), tuple(flat(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value


nested = st.recursive(leaves, containers, max_leaves=8)


@given(nested.filter(lambda value: any(True for _ in paths(value))), st.data())
@pytest.mark.case(20)
def test_reading_what_was_written_gives_it_back_in_every_nested_container(value, data):
    path = data.draw(st.sampled_from(list(paths(value))))
    before = flat(value)
    written = put(value, path, NEW)
    assert get(written, path) is NEW
    assert flat(value) == before  # what came in
    assert flat(put(written, path, get(value, path))) == before  # types, order, and all other members
    found = locate(place(".".join(map(str, path))), value)
    assert get(value, found) is get(value, path)


@given(nested)
def test_without_keys_an_activation_is_found_only_where_there_is_one_or_the_first_differs(value):
    try:
        keys = locate(place(), value)
    except OutputError:
        return
    assert keys in list(paths(value))
    outer = get(value, keys[:-1]) if keys else None
    if outer is not None:
        rivals = [path for path in paths(outer) if len(path) == 1]
        assert len(rivals) == 1  # all the tensors drawn have one rank


# --- inputs ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("args", "kwargs", "suffix", "keys"),
    [
        ((OLD,), {}, "", (0,)),
        ((), {"input": OLD}, "", ("input",)),
        ((OLD, IMAGE), {"mask": torch.zeros(1, 1, 1, 1)}, "", (0,)),
        ((OLD, 3), {"flag": True}, "", (0,)),
        ((OLD, REST), {}, "1", (1,)),
        ((OLD,), {"other": {"a": REST}}, "other.a", ("other", "a")),
        (((OLD, None),), {}, "0", (0, 0)),
    ],
)
@pytest.mark.case(23)
def test_arguments_are_read_and_rebuilt(args, kwargs, suffix, keys):
    value = Arguments(args, kwargs)
    assert locate(place(suffix, side="in"), value) == keys
    written = put(value, keys, NEW)
    assert isinstance(written, Arguments)
    assert get(written, keys) is NEW
    assert get(value, keys) is not NEW
    assert (len(written.args), list(written.kwargs)) == (len(args), list(kwargs))


def test_arguments_that_could_both_be_meant_are_asked_about_by_side():
    with pytest.raises(OutputError, match=r"the input \(.*\) holds several .* one of \['2:in.0', '2:in.1'\]"):
        locate(place(side="in"), Arguments((OLD, REST), {}))


def test_a_subclass_of_a_tensor_is_an_activation():
    parameter = nn.Parameter(torch.zeros(2))
    assert locate(place(), parameter) == ()
    assert locate(place(), (parameter,)) == (0,)


# --- nested tensors --------------------------------------------------------------------------------------------------
LENGTHS = (3, 1, 2)


def nested_tensor(layout):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 9, (length, 4), generator=generator).float() for length in LENGTHS]
    return rows, torch.nested.nested_tensor(rows, layout=layout)


every_nested = pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
ignoring = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
LENS = Lens(place(), Layout(-1))


def read(value, module=None):
    return LENS.read(module or nn.Identity(), value)


def plus_one(nested_one):
    view = read(nested_one).open()
    return view.write(view.part + 1)


@ignoring
@every_nested
@pytest.mark.case(14)
def test_a_nested_tensor_is_padded_and_back_with_its_layout(layout):
    rows, nested_one = nested_tensor(layout)
    assert read(nested_one).open().part.shape == read(nested_one).open().frame.shape == (3, 3, 4)
    back = plus_one(nested_one)
    assert back.is_nested
    assert back.layout is layout
    assert all(torch.equal(one, row + 1) for one, row in zip(back.unbind(), rows, strict=True))
    assert [tuple(part.shape) for part, _ in read(nested_one).rows()] == [(1, length, 4) for length in LENGTHS]


@ignoring
@pytest.mark.case(14)
def test_a_jagged_one_still_adds_to_what_it_was_made_from():
    rows, nested_one = nested_tensor(torch.jagged)
    total = nested_one + plus_one(nested_one)
    assert all(torch.equal(one, 2 * row + 1) for one, row in zip(total.unbind(), rows, strict=True))


@ignoring
@every_nested
@pytest.mark.case(14)
def test_gradients_flow_through_padding_and_back(layout):
    rows, _ = nested_tensor(layout)
    leaves_ = [row.requires_grad_() for row in rows]
    view = read(torch.nested.as_nested_tensor(leaves_, layout=layout)).open()
    sum(part.sum() for part in view.write(view.part * 2).unbind()).backward()
    assert all(torch.equal(leaf.grad, torch.full_like(leaf, 2.0)) for leaf in leaves_)


def transposed():
    return nested_tensor(torch.jagged)[1].transpose(1, 2)


def with_holes():
    return torch.nested.narrow(torch.zeros(2, 5, 4), 1, torch.tensor([0, 1]), torch.tensor([3, 2]), layout=torch.jagged)


@ignoring
@pytest.mark.parametrize("make", [transposed, with_holes])
@pytest.mark.case(14)
def test_a_nested_tensor_of_another_kind_is_edited_rightly_or_refused(make):
    nested_one = make()
    before = [row.clone() for row in nested_one.unbind()]
    try:
        back = plus_one(nested_one)
    except OutputError:
        return
    assert all(torch.equal(one, row + 1) for one, row in zip(back.unbind(), before, strict=True))


# --- the lens --------------------------------------------------------------------------------------------------------
@given(nested.filter(lambda value: any(True for _ in paths(value))), st.data())
def test_what_is_written_back_unchanged_is_the_same_value(value, data):
    path = data.draw(st.sampled_from(list(paths(value))))
    lens = Lens(place(".".join(map(str, path))), Layout(0))
    view = lens.read(nn.Identity(), value).open()
    assert flat(view.write(view.part)) == flat(value)
    assert torch.equal(view.part_of(view.features_last()), view.part)


@given(st.integers(2, 4), st.data())
def test_the_features_are_last_and_the_rows_first_wherever_they_lie(rank, data):
    shape = data.draw(st.permutations(range(2, 2 + rank)))
    axis = data.draw(st.integers(0, rank - 1))
    row_axis = data.draw(st.sampled_from([other for other in range(rank) if other != axis])) if rank > 2 else 1 - axis
    if rank == 2 and row_axis:
        return  # rows of a matrix are on its first axis
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    view = Lens(place(), Layout(axis, row_axis=row_axis)).read(nn.Identity(), x)
    ((last, frame),) = view.rows()
    assert torch.equal(last, x.movedim(axis, -1))
    assert torch.equal(frame.rows_first(last), x.movedim((row_axis, axis), (0, -1)))
    assert last.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()  # a view
    assert torch.equal(view.open().part_of(view.features_last()), x)


class Answer:
    """A user's output class, which torch's registry knows."""

    def __init__(self, words, score):
        self.words, self.score = words, score


torch.utils._pytree.register_pytree_node(
    Answer,
    lambda answer: ([answer.words, answer.score], None),
    lambda parts, _: Answer(*parts),
    flatten_with_keys_fn=lambda answer: (
        [(torch.utils._pytree.GetAttrKey(name), getattr(answer, name)) for name in ("words", "score")],
        None,
    ),
)


class Pair:
    """Another one, whose parts have no names there."""

    def __init__(self, one, other):
        self.one, self.other = one, other


torch.utils._pytree.register_pytree_node(
    Pair, lambda pair: ([pair.one, pair.other], None), lambda parts, _: Pair(*parts)
)


@pytest.mark.case(20)
def test_a_class_of_the_user_s_own_is_a_container_once_torch_s_registry_knows_it():
    answer = Answer(OLD, torch.tensor(0.5))
    written = put(answer, locate(place(), answer), NEW)
    assert (type(written), written.words is NEW, written.score is answer.score) == (Answer, True, True)
    assert answer.words is OLD
    assert locate(place("words"), answer) == ("words",)
    pair = Pair(None, OLD)
    assert locate(place("1"), (IMAGE, pair)[1]) == (1,)
    assert put(pair, (1,), NEW).other is NEW


class Shared(MutableMapping):
    """A user's mapping whose copies share what it holds."""

    def __init__(self, **parts):
        self._held = parts

    def __getitem__(self, key):
        return self._held[key]

    def __setitem__(self, key, part):
        self._held[key] = part

    def __delitem__(self, key):
        del self._held[key]

    def __iter__(self):
        return iter(self._held)

    def __len__(self):
        return len(self._held)


class ReadOnly(Mapping):
    """A user's mapping that cannot be written to."""

    __getitem__ = lambda self, key: {"hidden": OLD}[key]  # noqa: E731
    __iter__ = lambda self: iter(["hidden"])  # noqa: E731
    __len__ = lambda self: 1  # noqa: E731


class Paired(tuple):
    """A user's tuple that is made in a way of its own."""

    __slots__ = ()

    def __new__(cls, one, other):
        return super().__new__(cls, (one, other))


@pytest.mark.case(20)
@pytest.mark.parametrize("value", [Shared(hidden=OLD), ReadOnly(), Paired(OLD, None)], ids=["shared", "read", "tuple"])
def test_what_cannot_be_rebuilt_is_refused_unchanged_until_the_registry_knows_how(value):
    keys = locate(place(), value)
    with pytest.raises(OutputError, match=rf"register {type(value).__name__} with"):
        put(value, keys, NEW)
    assert get(value, keys) is OLD


class Registered(Shared):
    """The same, registered."""


torch.utils._pytree.register_pytree_node(
    Registered,
    lambda value: (list(value.values()), list(value)),
    lambda parts, keys: Registered(**dict(zip(keys, parts, strict=True))),
    flatten_with_keys_fn=lambda value: (
        [(torch.utils._pytree.MappingKey(key), part) for key, part in value.items()],
        list(value),
    ),
)


class Dotted(dict):
    """A user's dict that shows its items as attributes."""

    __getattr__ = dict.__getitem__


class Same(dict):
    """A user's dict that is its own attributes."""

    def __init__(self, **parts):
        super().__init__(**parts)
        self.__dict__ = self


@dataclasses.dataclass
class Derived:
    """A user's dataclass that computes something from its part, once."""

    hidden: Any

    @functools.cached_property
    def doubled(self):
        return 2 * self.hidden


@pytest.mark.case(20)
@pytest.mark.parametrize(
    "value",
    [Registered(hidden=OLD), Dotted(hidden=OLD), Same(hidden=OLD), Derived(OLD)],
    ids=["registered", "dotted", "same", "derived"],
)
def test_every_way_to_read_an_edited_part_reads_the_edited_one(value):
    if isinstance(value, Derived):
        assert torch.equal(value.doubled, 2 * OLD)
    written = put(value, locate(place(), value), NEW)
    assert type(written) is type(value)
    assert get(value, ("hidden",)) is OLD
    assert get(written, ("hidden",)) is NEW
    if not isinstance(value, Registered):
        assert written.hidden is NEW
    if isinstance(value, Derived):
        assert torch.equal(written.doubled, 2 * NEW)


def test_a_class_that_the_registry_does_not_know_is_refused_and_told_how():
    class Unknown:
        hidden = OLD

    with pytest.raises(OutputError, match=r"expected a floating tensor.*got a Unknown.*register"):
        locate(place(), Unknown())


def test_a_model_whose_blocks_give_a_registered_class_is_steered_and_collected():
    class Block(nn.Linear):
        def forward(self, x):
            return Answer(super().forward(x), torch.tensor(1.0))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(2, 2)

        def forward(self, x):
            return self.block(x).words

    model, x = Model(), torch.randn(4, 2)
    v = SteeringVector({"block": torch.tensor([1.0, 2.0])})
    plain = model(x)
    with Steerer(model, v, c=2):
        assert torch.equal(model(x), plain + 2 * v["block"])
    torch.testing.assert_close(record(model, x, sites="block", progress=False)["block"], plain)


def test_a_copy_of_the_container_is_shallow():
    extra = [1, 2]
    written = put(Output(OLD, extra), ("hidden",), NEW)
    assert written.cache is extra
    assert copy.copy(written).hidden is NEW
