"""Silence: a block that ends without an error and has steered nothing says so."""

import threading

import pytest
import torch
from torch import nn

from actsteer import ActsteerError, Steerer, SteeringVector, VectorBank, fit, sweep
from tests.test_transformers import TOKENS, D, small_gpt2
from tests.zoo import exact, normal

X = normal(6, 4)
V = SteeringVector({"1": torch.ones(4)})
W = SteeringVector({"transformer.h.0": torch.ones(D)})


# --- a block in which the model never ran ----------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["auto", "tap", "hook"])
@pytest.mark.parametrize("scope", ["process", "context"])
def test_a_block_in_which_the_model_did_not_run_is_warned_about(backend, scope):
    model = exact()
    steerer = Steerer(model, V, backend=backend, scope=scope)
    with (
        pytest.warns(UserWarning, match="the Sequential did not run in the block, so that nothing was steered") as seen,
        steerer,
    ):
        exact()(X)  # another one
    assert len(seen) == 1
    assert not steerer.attached
    with steerer:
        model(X)
    with pytest.warns(UserWarning, match="did not run in the block"), steerer:  # each block by itself
        pass


def test_no_word_of_a_block_that_ran_or_failed_or_may_have():
    model = exact()
    with Steerer(model, V):
        model[:2](X)  # a part, with the site in it
    with Steerer(model, V, strict=False):
        pass
    with pytest.raises(ZeroDivisionError), Steerer(model, V):
        raise ZeroDivisionError
    for backend in ("fold", "buffer"):  # which exported code reads
        with Steerer(model, SteeringVector({"0": torch.ones(4)}), backend=backend):
            pass
    steerer = Steerer(model, V).attach()
    steerer.detach()
    with Steerer(model, V) as steerer:
        steerer.detach()


def test_a_block_whose_model_ran_in_another_thread():
    model = exact()
    with Steerer(model, V):
        thread = threading.Thread(target=model, args=(X,))
        thread.start()
        thread.join()


def test_compiled_code_counts_as_a_run():
    torch.compiler.reset()
    model = exact()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        with Steerer(model, V):
            compiled(X)
    torch.compiler.reset()


def test_no_word_at_strength_zero():
    with Steerer(exact(), V, c=0.0):
        pass
    assert sweep(exact(), V, c=[], evaluate=lambda model: 0.0) == []


def test_a_sweep_whose_metric_does_not_run_the_model():
    with pytest.warns(UserWarning, match="did not run in the block"):
        sweep(exact(), V, c=[0, 1], evaluate=lambda model: 0.0)


# --- positions="generated" in a plain forward pass -------------------------------------------------------------------
def test_what_is_to_be_generated_in_a_plain_pass_is_warned_about():
    model, texts = small_gpt2(), {"input_ids": TOKENS}
    with (
        pytest.warns(
            UserWarning, match="positions='generated' of 'vector': nothing was generated in the block"
        ) as seen,
        Steerer(model, W, positions="generated"),
    ):
        model(**texts)
    assert len(seen) == 1
    bank = VectorBank({"calm": W, "brief": W})
    steerer = Steerer(model, bank, positions={"brief": "generated"})
    with pytest.warns(UserWarning, match="of 'brief': nothing was generated") as seen, steerer:
        model(**texts)
    assert len(seen) == 1


@pytest.mark.parametrize("use_cache", [True, False])
def test_what_is_generated_is_no_silence(use_cache):
    model = small_gpt2()
    steerer = Steerer(model, W, positions="generated")
    for _ in range(2):
        with steerer:
            model.generate(TOKENS, max_new_tokens=3, do_sample=False, use_cache=use_cache, pad_token_id=0)
    with pytest.warns(UserWarning, match="nothing was generated in the block"), steerer:  # each block by itself
        model(input_ids=TOKENS)
    for options in ({"c": 0.0}, {"positions": "prompt"}, {"positions": slice(1, 2)}, {"strict": False}):
        with Steerer(model, W, **({"positions": "generated"} | options)):
            model(input_ids=TOKENS)


def test_one_token_alone_is_a_prompt_too():
    model = small_gpt2()
    with Steerer(model, W, positions="generated"):  # and the second is its answer
        model.generate(TOKENS[:, :1], max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
    with pytest.warns(UserWarning, match="nothing was generated"), Steerer(model, W, positions="generated"):
        model.generate(TOKENS[:, :1], max_new_tokens=1, do_sample=False, pad_token_id=0)


def test_pads_make_no_difference_to_what_is_said():
    model, mask = small_gpt2(), torch.ones_like(TOKENS)
    mask[0, :2] = 0
    with pytest.warns(UserWarning, match="nothing was generated"), Steerer(model, W, positions="generated"):
        model(input_ids=TOKENS, attention_mask=mask)
    with Steerer(model, W, positions="generated"):
        model.generate(TOKENS, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)


# --- a direction of norm 0 -------------------------------------------------------------------------------------------
class Half:
    reads = "means"

    def __call__(self, *, positive, negative):
        return SteeringVector({site: (positive[site].mean - negative[site].mean) / 2 for site in positive})


@pytest.mark.parametrize("estimator", [None, Half()])
def test_sides_that_are_alike_are_warned_about(estimator):
    with pytest.warns(UserWarning, match="the vector is zero: both sides are alike at these sites") as seen:
        fit(exact(), positive=X, negative=X, sites=["1", "3"], estimator=estimator)
    assert len(seen) == 1


def test_a_site_at_which_they_are_alike_is_named():
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    with pytest.warns(UserWarning, match=r"both sides are alike at \['1'\]"):
        fit(model, positive=-torch.ones(2, 3), negative=-2 * torch.ones(2, 3), sites=["0", "1"])


# --- what could be set by mistake ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["strength", "alpha", "coefficient", "C"])
def test_a_strength_under_another_name_is_refused(name):
    steerer = Steerer(exact(), V)
    with pytest.raises(
        AttributeError, match=rf"a Steerer has no '{name}' to be set, but c, its strength; did you mean c?"
    ):
        setattr(steerer, name, 2.0)
    for option in ("sites", "gate", "positions", "intervention", "model", "bank"):
        with pytest.raises(AttributeError, match=f"{option} cannot be changed, c can; make a new Steerer with another"):
            setattr(steerer, option, None)
    steerer.c = 2.0
    assert steerer.c == 2.0 and issubclass(ActsteerError, Exception)
