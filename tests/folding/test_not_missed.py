"""What a fold must not miss: other readers, other writers, hooks, other backends, training, buffers, pads."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from actsteer import (
    Ablate,
    AttachedError,
    NotFoldable,
    Steerer,
    SteeringVector,
    StrengthError,
    UnsupportedModelError,
    fold,
    unfold,
)
from actsteer.folding.affine import AffineMap
from actsteer.folding.layers import obstacle
from tests.zoo import llama

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(5))


def direction(size, seed=1):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A layer "l", a site "site" behind it, a head, and what the test makes of them."""

    def __init__(self, forward, *, site=nn.Identity):
        super().__init__()
        torch.manual_seed(0)
        self.l, self.site, self.head, self.other = nn.Linear(4, 6), site(), nn.Linear(6, 3), nn.Linear(6, 6)
        self.register_buffer("table", torch.cat([torch.zeros(1, 6), torch.randn(4, 6)]))
        self.run = forward

    def forward(self, *args):
        return self.run(self, *args)


def fold_of(model, v, x, c=1.0, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fold(model, v, c, verify_on=x, **options)


def differ(model, folded, v, x, c=1.0, **options):
    """How far the folded model is from the hooked one."""
    x = x if isinstance(x, tuple) else (x,)
    with torch.no_grad(), Steerer(model, v, c=c, **options):
        hooked = model(*x)
    with torch.no_grad():
        return float((folded(*x) - hooked).abs().max())


V = SteeringVector({"site": direction(6)})


# --- who else reads what the layer makes -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.head(m.site(h := m.l(x))) + (h - 4).relu().sum(-1, keepdim=True),
        lambda m, x: torch.cat([1e7 * m.head(m.site(h := m.l(x))), h], -1),
        lambda m, x: m.head(m.site(h := m.l(x))) + m.head(m.other(h)),
    ],
    ids=["seldom", "small beside the rest", "a layer"],
)
def test_a_layer_that_others_read_does_not_take_it(forward):
    model = Net(forward)
    if "other" in forward.__code__.co_names:  # the head runs twice
        with pytest.raises(NotFoldable, match=r"l \(Linear\) too"):
            fold_of(model, V, X * 0.3)
        return
    folded = fold_of(model, V, X * 0.3)
    assert torch.equal(folded.l.bias, model.l.bias) and not torch.equal(folded.head.bias, model.head.bias)
    assert differ(model, folded, V, X * 20) < 1e-4 * float(model(X * 20).detach().abs().max())


def test_an_input_is_folded_into_the_one_module_that_has_it():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 24, "num_attention_heads": 2}
    model = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=32, word_embed_proj_dim=16, init_std=0.3)).eval()
    site = "model.decoder.layers.1.self_attn.v_proj:in"
    v = SteeringVector({site: direction(16)})
    folded = fold_of(model, v, {"input_ids": torch.tensor([[5], [9]])}, 3.0)  # one key, whatever the query
    ids = torch.tensor([[5, 9, 3, 7, 11]])
    with torch.no_grad(), Steerer(model, v, c=3.0):
        steered = model(ids).logits
    assert torch.allclose(folded(ids).logits, steered, atol=1e-4)
    assert not torch.allclose(model(ids).logits, steered, atol=1e-2)


def test_a_sum_with_what_autograd_does_not_see_is_not_ablated():
    model = Net(lambda m, x, kind: m.head(m.site(m.l(x) + m.table[kind])))
    model.head.forward = partial(nn.Linear.forward, model.head)  # so that the reader cannot take it
    with pytest.raises(NotFoldable, match="something that autograd does not see"):
        fold_of(model, V, (X, torch.zeros(8).long()), intervention=Ablate())
    del model.head.forward
    folded = fold_of(model, V, (X, torch.zeros(8).long()), intervention=Ablate())  # into the reader
    assert differ(model, folded, V, (X, torch.arange(8) % 5), intervention=Ablate()) < 1e-5
    added = fold_of(model, V, (X, torch.zeros(8).long()))
    assert differ(model, added, V, (X, torch.arange(8) % 5)) < 1e-5


def test_integers_that_the_model_returns_count():
    model = Net(lambda m, x: (m.head(h := m.site(m.l(x))), h.argmax(-1)), site=nn.ReLU)
    with pytest.raises(NotFoldable, match=r"the outputs differ by [1-5], where rounding makes 0"):
        fold_of(model, SteeringVector({"site": 50 * torch.eye(6)[2]}), X)


def test_outputs_that_autograd_does_not_reach_prove_nothing():
    model = Net(lambda m, x: ((m.head(h := m.site(m.l(x))) + h[:, :3]).softmax(-1) > 0.5).float(), site=nn.ReLU)
    with pytest.raises(NotFoldable, match="do not depend on them in a way that autograd sees"):
        fold_of(model, 5 * V, X)


# --- what did not run --------------------------------------------------------------------------------------------
def test_layers_that_did_not_run_are_warned_about():
    model = Net(lambda m, x: m.head(m.site(m.other(m.l(x)) if x.sum() > 1e6 else m.l(x)).tanh()))
    with pytest.warns(UserWarning, match="other did not run on verify_on"):
        fold(model, V, verify_on=X)
    model = Net(lambda m, x: m.head(m.site(m.other(m.l(x)))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fold(model, V, verify_on=X)


def test_a_layer_with_a_hook_does_not_take_it():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    handle = model[0].register_forward_hook(lambda _, __, out: out.clamp(-3, 3))
    v = SteeringVector({"0": torch.eye(6)[2]})
    with pytest.raises(NotFoldable, match=r"it has hooks, .* an operation \(ClampBackward1\) reads it"):
        fold(model, v, verify_on=X * 0.3)  # the steering comes before the hook
    handle.remove()
    model[1].register_forward_pre_hook(lambda _, args: None)
    assert differ(model, fold(model, v, verify_on=X), v, X * 30) < 1e-4


class Cap:
    """Affine, as far as one usually looks."""

    def __call__(self, activation, direction, c):
        return (activation + c * direction).clamp(-1e4, 1e4)


def test_what_is_affine_for_small_numbers_alone_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    with pytest.raises(NotFoldable, match="Cap is not an affine map"):
        fold(model, SteeringVector({"0": direction(6)}), verify_on=X, intervention=Cap())


# --- in place ----------------------------------------------------------------------------------------------------
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def test_the_fold_backend_and_a_fold_in_place_do_not_mix():
    model, v, w = small(), SteeringVector({"2": direction(3)}), SteeringVector({"1": direction(6)})
    plain = model(X)
    for backend in ("fold", "auto", "buffer"):
        for inplace in (True, False):
            with Steerer(model, v, backend=backend, strict=False):
                said = r"is being steered, by Steerer\(.*; leave the block, or detach it"
                with pytest.raises(AttachedError, match=said):
                    fold(model, w, verify_on=X, inplace=inplace)
        assert torch.equal(model(X), plain)
    fold(model, w, verify_on=X, inplace=True)
    with Steerer(model, v, backend="fold"), pytest.raises(AttachedError, match="backend='fold' is attached"):
        unfold(model)
    unfold(model)
    assert torch.equal(model(X), plain)


def test_unfolding_does_not_undo_what_was_trained_since():
    model, v = small(), SteeringVector({"1": direction(6)})
    fold(model, v, verify_on=X, inplace=True)
    with torch.no_grad():
        model[2].weight += 1  # which the fold never touched
    trained = model[2].weight.detach().clone()
    unfold(model)
    assert torch.equal(model[2].weight, trained)
    fold(model, v, verify_on=X, inplace=True)
    with torch.no_grad():
        model[2].bias += 1
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NotFoldable, match=r"2\.bias was changed or replaced after the fold"):
        unfold(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_unfolding_a_model_whose_parameters_were_replaced():
    model, v = small(), SteeringVector({"1": direction(6)})
    plain = model(X)
    fold(model, v, verify_on=X, inplace=True)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    unfold(model)  # the same numbers in other tensors
    assert torch.equal(model(X), plain)
    fold(model, v, verify_on=X, inplace=True)
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()}, assign=True)
    with pytest.raises(NotFoldable, match="was changed or replaced"):
        unfold(model)


def test_training_between_two_folds_is_not_undone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    fold(model, SteeringVector({"1": direction(6)}), verify_on=X, inplace=True)
    with torch.no_grad():
        model[2].bias += 1
    fold(model, SteeringVector({"3": direction(6)}), verify_on=X, inplace=True)
    unfold(model)
    with pytest.raises(NotFoldable, match=r"2\.bias was changed"):
        unfold(model)


def test_a_sparse_buffer_is_left_alone():
    model = Net(lambda m, x: m.head(torch.relu(torch.sparse.mm(m.table, m.site(m.l(x))))))
    model.table = torch.eye(8).to_sparse()
    plain = model(X)
    fold_of(model, V, X, inplace=True)
    unfold(model)
    assert torch.equal(model(X), plain)


def test_layers_that_run_without_gradients_have_run():
    def forward(m, x):
        with torch.no_grad():
            hidden = m.other(m.l(x))
        return m.head(torch.tanh(m.site(m.head.weight.sum() * 0 + hidden)))

    model = Net(forward)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fold(model, SteeringVector({"head": direction(3)}), verify_on=X)


def test_two_folds_in_place_are_undone_one_by_one():
    model = small()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold(model, SteeringVector({"1": direction(6)}), verify_on=X, inplace=True)
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold(model, SteeringVector({"1": direction(6, seed=2)}), verify_on=X, inplace=True)
    for state in (once, plain):
        unfold(model)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_buffers_that_count_are_as_they_were(inplace, fails):
    def forward(m, x):
        m.table += 1
        return m.head(torch.tanh(m.site(m.l(x))) if not fails else m.site(torch.tanh(m.l(x))).tanh())

    model = Net(forward)
    before = model.table.clone()
    if fails:
        with pytest.raises(NotFoldable):
            fold_of(model, V, X, inplace=inplace)
    else:
        folded = fold_of(model, V, X, inplace=inplace)
        assert torch.equal(folded.table, before)
    assert torch.equal(model.table, before)


# --- texts -------------------------------------------------------------------------------------------------------
def test_pads_that_the_model_looks_at_are_not_left_out():
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.l, self.head = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, input_ids, attention_mask=None):
            return self.head(self.l(self.embed(input_ids)).mean(dim=1))

    batch = {"input_ids": torch.tensor([[3, 4, 5], [6, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    v = SteeringVector({"l": direction(6)})
    with pytest.raises(NotFoldable, match="the outputs differ"):
        fold(Pools(), v, verify_on=batch)
    whole = {name: tensor[:1] for name, tensor in batch.items()}
    fold(Pools(), v, verify_on=whole)


def test_a_row_of_nothing_but_pads_is_left_out():
    batch = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "attention_mask": torch.tensor([[1, 1], [0, 0]])}
    folded = fold(llama(), SteeringVector({"model.layers.1": direction(16).double()}), 2.0, verify_on=batch)
    assert folded is not None


def test_a_part_whose_bias_would_be_lost_is_not_saved_either(tmp_path):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm, self.head = llama(kind="Qwen2").float(), nn.Linear(37, 2)

        def forward(self, input_ids):
            return self.head(self.lm(input_ids=input_ids).logits)

    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    folded = fold(Classifier(), SteeringVector({"lm.model.layers.1": direction(16)}), 5.0, verify_on=ids)
    for part in (folded.lm, folded.lm.model):
        with pytest.raises(UnsupportedModelError, match="has no place for the biases"):
            part.save_pretrained(tmp_path)
    one = fold(llama().float(), SteeringVector({"model.layers.1": direction(16)}), 5.0, verify_on=ids)
    one.model.save_pretrained(tmp_path / "llama")  # the part's config is the model's, and asks for them
    from transformers import AutoModel

    again = AutoModel.from_pretrained(tmp_path / "llama").eval()
    assert torch.allclose(again(**ids).last_hidden_state, one.model(**ids).last_hidden_state, atol=1e-5)


# --- errors ------------------------------------------------------------------------------------------------------
def test_a_parametrised_weight_leaves_the_bias_to_be_folded():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    v = SteeringVector({"0": direction(4)})
    assert differ(model, fold(model, v, verify_on=X), v, X) < 1e-5


def test_a_bias_is_made_in_the_dtype_of_the_statistics():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    v = SteeringVector({"1": direction(4).double()})
    folded = fold(model, v, verify_on=X.double())
    assert differ(model, folded, v, X.double()) < 1e-9


def parametrised_bias():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    torch.nn.utils.parametrize.register_parametrization(model[2], "bias", nn.Identity())
    return model


def pruned():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    prune.random_unstructured(model[0], "weight", 0.3)
    return model


def inference():
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (parametrised_bias, {}, "its bias is parametrised"),
        (pruned, {}, "cannot be copied"),
        (inference, {"inplace": True}, "inference"),
    ],
)
def test_what_cannot_be_folded_says_so(model, options, why):
    with pytest.raises(NotFoldable, match=why):
        fold(model(), SteeringVector({"1": direction(4)}), verify_on=X, **options)


# --- outputs of many kinds -------------------------------------------------------------------------------------------
def top_two(m, x):
    logits = m.head(torch.tanh(m.other(m.site(m.l(x)))))
    return logits.masked_fill(logits < logits.topk(2, -1).values[:, -1:], float("-inf"))


def test_infinities_by_design_may_be_elsewhere():
    model = Net(top_two)
    plain = model(X).isinf()
    with torch.no_grad(), Steerer(model, V, c=9.0):
        steered = model(X)
    assert not torch.equal(plain, steered.isinf()) and plain.sum() == steered.isinf().sum()
    folded = fold(model, V, 9.0, verify_on=X)
    assert torch.allclose(folded(X), steered, atol=1e-5)


def test_a_fold_that_gives_more_infinities_or_nan_is_refused():
    with pytest.raises(StrengthError, match=r"within the range of torch.float32"):
        fold_of(Net(lambda m, x: m.head(m.site(m.l(x)))), V, X, 1e39)
    with pytest.raises(NotFoldable, match="infinite or nan; c is too large"):
        fold_of(Net(lambda m, x: m.head(torch.log(6 + m.site(m.l(x))))), V, X, 100.0)


class Routed(nn.Module):
    """Gives the logits of every token of every row in one row, as routers of experts do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.l, self.head = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.head(torch.tanh(self.l(self.embed(input_ids))))
        if labels is None:
            return hidden, hidden.flatten(0, 1)
        return nn.functional.cross_entropy(hidden.flatten(0, 1), labels.flatten()), hidden


PADDED = {"input_ids": torch.tensor([[3, 4, 5], [6, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}


class Shifted(Routed):
    """What pads hold comes to all rows, and so to those of the tokens."""

    def forward(self, input_ids, attention_mask=None):
        hidden = self.head(torch.tanh(self.l(self.embed(input_ids))))
        return hidden + hidden.mean(dim=1, keepdim=True)


def test_pads_of_outputs_without_rows_do_not_count():
    model, v = Routed(), SteeringVector({"l": direction(6)})
    assert torch.equal(fold(model, v, verify_on=PADDED).head.weight, model.head.weight)
    with pytest.raises(NotFoldable, match="on the rows with their pads"):
        fold(Shifted(), v, verify_on=PADDED)


def test_labels_lose_the_pads_of_their_tokens():
    model, v = Routed(), SteeringVector({"l": direction(6)})
    fold(model, v, verify_on=PADDED | {"labels": torch.tensor([[0, 1, 2], [1, -100, -100]])})


# --- wrapped, quantised, elsewhere -----------------------------------------------------------------------------------
def test_a_compiled_model_s_checkpoint_asks_for_the_biases_too(tmp_path):
    torch.compiler.reset()
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    v = SteeringVector({"model.layers.1": direction(16)})
    folded = fold(torch.compile(llama().float(), backend="eager"), v, 2.0, verify_on=ids)
    assert folded._orig_mod.config.mlp_bias
    with pytest.raises(UnsupportedModelError, match="has no place for the biases"):
        fold(torch.compile(llama(kind="Qwen2").float(), backend="eager"), v, verify_on=ids)._orig_mod.save_pretrained(
            tmp_path
        )
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda layer: layer.weight.data.to(torch.float8_e4m3fn), "its weight is quantised, torch.float8_e4m3fn"),
        (lambda layer: layer.weight.data.to("meta"), "its parameters are not on this device"),
    ],
)
def test_weights_that_cannot_be_written(change, why):
    layer = nn.Linear(4, 6, bias=False)
    layer.weight = nn.Parameter(change(layer), requires_grad=False)
    edit = AffineMap(torch.eye(6).double(), torch.eye(6).double(), torch.ones(6).double())
    assert obstacle(layer, edit, at="output") == why
