"""check: how large the activations are, and whether an edit arrives at what the model returns."""

import re

import pytest
import torch
import transformers
from torch import nn

from actsteer import (
    Ablate,
    Add,
    AttachedError,
    CosineAbove,
    KeepNorm,
    ShapeError,
    SiteNotFoundError,
    StatisticsError,
    Steerer,
    SteeringVector,
    VectorBank,
    collect,
    fold,
)
from tests.oracles import state
from tests.zoo import normal

X = normal(64, 3).float()
MASK = {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}


class Both(nn.Module):
    """What one branch makes is returned, and what the other makes is thrown away, or handed out beside it."""

    def __init__(self, *, hands_out=False):
        super().__init__()
        self.used, self.spare, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.hands_out = hands_out

    def forward(self, x):
        spare = self.spare(x)
        answer = self.head(self.used(x))
        return {"answer": answer, "spare": spare} if self.hands_out else answer


def warned(record):
    return [str(one.message) for one in record]


# --- how large -------------------------------------------------------------------------------------------------------
def test_the_share_is_that_of_the_median_norm_and_of_statistics_the_root_mean_square():
    model, v = nn.Sequential(nn.Identity()), SteeringVector({"0": torch.tensor([3.0, 4.0, 0.0])}, concept="up")
    steerer = Steerer(model, v, c=-2.0)
    assert "‖" not in steerer.explain()
    median, mean_square = float(X.norm(dim=1).median()), float(X.square().sum(dim=1).mean().sqrt())
    given = [X, list(X.split(10)), iter([X]), (X,), {"input": X}, collect(model, X, sites="0", covariance=True)]
    for inputs, typical in zip(given, [median] * 5 + [mean_square], strict=True):
        said = rf"up: Add, c = -2, norm 5, ‖c·v‖ {10 / typical:.2g} of the typical ‖h‖ {typical:.3g}"
        steerer = Steerer(model, v, c=-2.0)
        found = steerer.check(inputs)
        assert said in found
        assert steerer.explain() == found
    diagonal = collect(model, X, sites="0", covariance="diagonal")
    assert said in Steerer(model, v, c=-2.0).check(diagonal)


def test_pads_have_no_size():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.site = nn.Identity()

        def forward(self, x, attention_mask=None):
            return self.site(x)

    x = torch.ones(2, 3, 4)
    x[MASK["attention_mask"] == 0] = 1e6
    assert "typical ‖h‖ 2" in Steerer(Model(), SteeringVector({"site": torch.ones(4)})).check({"x": x, **MASK})


def test_the_share_is_of_what_is_added_now_and_of_the_largest_of_several():
    model, v = nn.Sequential(nn.Identity()), SteeringVector({"0": torch.tensor([4.0, 0.0, 0.0])})
    steerer = Steerer(model, v)
    steerer.check(torch.full((2, 3), 8 / 3**0.5))
    assert "‖c·v‖ 0.5 of the typical ‖h‖ 8" in steerer.explain()
    steerer.c = torch.tensor([1.0, -6.0])
    assert "‖c·v‖ up to 3 of the typical ‖h‖ 8" in steerer.explain()
    for other in (Ablate(), Add(relative=True), KeepNorm(Add())):
        edited = Steerer(model, v, intervention=other)
        assert "‖c·v‖" not in edited.check(X - X.mean(dim=0))


def test_a_check_changes_nothing_and_is_of_the_unsteered_model():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    before = state(model)
    v = SteeringVector({"1": 100 * torch.ones(3), "2:in": torch.ones(3)})
    steerer = Steerer(model, v)
    first = steerer.check(X)
    assert state(model) == before
    assert steerer.check(X) == first
    with steerer:
        model(X)
        with pytest.raises(AttachedError, match="what is checked is the unsteered model; leave the block"):
            steerer.check(X)
    with Steerer(model, v):  # of another is what the unsteered model is here
        assert steerer.check(X) != first
        model(X)


def test_statistics_that_do_not_tell_are_refused():
    model, v = nn.Sequential(nn.Identity(), nn.ReLU()), SteeringVector({"1": torch.ones(3)})
    with pytest.raises(StatisticsError, match="no covariance was collected"):
        Steerer(model, v).check(collect(model, X, sites="1"))
    with pytest.raises(SiteNotFoundError, match="no statistics for site '1'"):
        Steerer(model, v).check(collect(model, X, sites="0", covariance=True))


# --- whether it arrives ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("site", ["spare", "spare:in"])
def test_a_site_on_which_no_answer_depends_is_warned_about(site):
    v = SteeringVector({site: torch.ones(3), "used": torch.ones(3)})
    with pytest.warns(UserWarning, match=rf"site '{site}': nothing that the model returns depends on it") as record:
        Steerer(Both(), v).check(X)
    assert len(record) == 1


def test_an_activation_that_is_handed_out_beside_the_answer_is_not_the_answer():
    v = SteeringVector({"spare": torch.ones(3)})
    with pytest.warns(UserWarning, match="but the activation itself"):
        Steerer(Both(hands_out=True), v).check(X)
    Steerer(nn.Sequential(nn.Linear(3, 3)), SteeringVector({"0": torch.ones(3)})).check(X)  # which is the answer


def test_a_vision_model_of_which_the_pooled_output_is_read():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {**sizes, "vocab_size": 17, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)
    model = transformers.CLIPModel(config).eval()
    inputs = {"input_ids": torch.tensor([[1, 5, 2]]), "pixel_values": normal(1, 3, 8, 8).float()}
    lost, reached = "vision_model:out.last_hidden_state", "vision_model.post_layernorm"
    with pytest.warns(UserWarning, match=rf"site '{re.escape(lost)}': nothing that the model returns depends on it"):
        Steerer(model, SteeringVector({lost: torch.ones(8)})).check(inputs)
    Steerer(model, SteeringVector({reached: torch.ones(8), "vision_model.encoder.layers.1": torch.ones(8)})).check(
        inputs
    )


class Unseen(nn.Module):
    """A way that autograd does not see, but that is one."""

    def __init__(self, way):
        super().__init__()
        self.site, self.way = nn.Identity(), way

    def forward(self, x):
        return self.way(self.site(x))


WAYS = {
    "rounded": lambda h: (h * 100).round().long(),
    "argmax": lambda h: h.argmax(dim=1),
    "detached": lambda h: h.detach() * 2,
    "without gradients": torch.no_grad()(lambda h: h * 2),
    "numpy": lambda h: torch.from_numpy(h.detach().numpy() * 2),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_autograd_does_not_see_is_tried(way):
    Steerer(Unseen(way), SteeringVector({"site": torch.ones(3)})).check(X)


def test_a_way_that_loses_all_is_warned_about():
    with pytest.warns(UserWarning, match="nothing that the model returns depends on it"):
        Steerer(Unseen(lambda h: h.shape[0] * torch.ones(2)), SteeringVector({"site": torch.ones(3)})).check(X)


class Answer:
    """A class of the user's, which nothing can open."""

    def __init__(self, value):
        self.value = value


OPAQUE = {
    "a class": Answer,
    "a list": lambda h: (2 * h).tolist(),
    "an array": lambda h: (2 * h).detach().numpy(),
    "a number": lambda h: h.sum().item(),
    "nothing": lambda h: None,
    "a distribution": lambda h: torch.distributions.Categorical(logits=h),
}


@pytest.mark.parametrize("way", OPAQUE.values(), ids=OPAQUE)
def test_where_no_answer_can_be_looked_at_nothing_is_said(way):
    Steerer(Unseen(way), SteeringVector({"site": torch.ones(3)})).check(X)


@pytest.mark.parametrize(
    "way",
    [
        lambda h: {"mask": torch.ones(3), "out": Answer(h)},
        lambda h: (h.argmax(-1).tolist(), torch.ones(3)),
        lambda h: {"score": h.sum().item(), "x": torch.ones(3)},
    ],
)
def test_where_a_part_of_the_answer_cannot_be_looked_at_nothing_is_said(way):
    Steerer(Unseen(lambda h: way(h.detach())), SteeringVector({"site": torch.ones(3)})).check(X)


@pytest.mark.parametrize("seed", range(20))
def test_an_answer_that_is_one_of_two_is_tried_more_than_once(seed):
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(seed))
    for way in (lambda h: h[:, :2].argmax(dim=1), lambda h: (h.sum(dim=1).sigmoid() > 0.5).float()):
        Steerer(Unseen(way), SteeringVector({"site": torch.ones(3)})).check(x)


class Forces(nn.Module):
    """The gradient of an energy, as of molecules."""

    def __init__(self):
        super().__init__()
        self.site = nn.Linear(3, 3)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return -torch.autograd.grad(self.site(x).square().sum(), x)[0]


class Written(nn.Module):
    """What lies in a tensor that it was given to write to."""

    def __init__(self):
        super().__init__()
        self.site, self.out = nn.Identity(), torch.empty(len(X), 3)

    def forward(self, x):
        return torch.mul(self.site(x).detach(), 2.0, out=self.out).clone()


@pytest.mark.parametrize("model", [Forces(), Written()], ids=["forces", "out="])
def test_a_model_that_cannot_be_traced_is_tried(model):
    Steerer(model, SteeringVector({"site": torch.ones(3)})).check(X)


def test_inputs_of_inference_mode_are_no_hindrance():
    with torch.inference_mode():
        x = X + 0
        with pytest.warns(UserWarning, match="'spare': nothing"):
            Steerer(Both(), SteeringVector({"spare": torch.ones(3), "used": torch.ones(3)})).check(x)
    with pytest.warns(UserWarning, match="'spare': nothing"):
        Steerer(Both(), SteeringVector({"spare": torch.ones(3), "used": torch.ones(3)})).check(x)


def test_a_result_that_is_dropped_where_the_module_works_in_place_is_reached():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            h = 2 * x
            self.relu(h)
            return h

    Steerer(Dropped(), SteeringVector({"relu": torch.ones(3)})).check(X)


def test_a_site_that_nobody_reads_is_told_whatever_kernels_run():
    """Grad mode and no_grad take other kernels, whose rounding is no evidence."""
    for seed in range(3):
        torch.manual_seed(seed)
        lstm = nn.LSTM(3, 4, num_layers=3, batch_first=True)
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        model = nn.ModuleDict(
            {"lstm": lstm, "encoder": nn.TransformerEncoder(layer, 2), "dead": nn.Linear(4, 4)}
        ).eval()
        model.forward = lambda x, m=model: m["encoder"](m["lstm"](x)[0] + 0 * m["dead"](m["lstm"](x)[0]).detach())
        used = SteeringVector({"encoder.layers.0": torch.ones(4)})
        Steerer(model, used).check(X[:, None])
        with pytest.warns(UserWarning, match="site 'dead': nothing"):
            Steerer(model, SteeringVector({"dead": torch.ones(4)})).check(X[:, None])


def test_buffers_that_a_pass_writes_are_as_they_were():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.site = nn.Identity()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            return self.site(x)

    model = Counting()
    Steerer(model, SteeringVector({"site": torch.ones(3)})).check([X, X])
    assert model.seen == 0


def test_a_single_row_says_nothing_of_where_the_rest_lie():
    model, v = nn.Sequential(nn.Identity()), SteeringVector({"0": torch.tensor([0.0, 2.0, 0.0])})
    Steerer(model, v, intervention=Ablate()).check(X[:1] + 20)


@pytest.mark.parametrize("scope", ["inference", "no_grad", "plain"])
def test_a_check_works_in_any_mode_of_autograd(scope):
    modes = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "plain": torch.enable_grad}
    with modes[scope](), pytest.warns(UserWarning, match="'spare': nothing"):
        Steerer(Both(), SteeringVector({"spare": torch.ones(3), "used": torch.ones(3)})).check(X)


# --- Ablate ----------------------------------------------------------------------------------------------------------
def test_an_ablation_that_moves_all_rows_far_is_warned_about():
    model, v = nn.Sequential(nn.Identity()), SteeringVector({"0": torch.tensor([0.0, 2.0, 0.0])}, concept="up")
    far, near = X + torch.tensor([0.0, 20.0, 0.0]), X + torch.tensor([50.0, 0.0, 0.0])
    said = (
        r"along 'up' the activations lie at (20|19)\.?\d* ± 1.*, and Ablate sets all.* Ablate\(around=\{site: mean\}\)"
    )
    for inputs in (far, collect(model, far, sites="0", covariance=True)):
        with pytest.warns(UserWarning, match=said):
            Steerer(model, v, intervention=Ablate()).check(inputs)
        Steerer(model, v).check(inputs)
        Steerer(model, v, intervention=Ablate(around={"0": far.mean(dim=0)})).check(inputs)
    Steerer(model, v, intervention=Ablate()).check(near)


def test_around_a_mean_every_row_projects_as_the_mean_does():
    mean, v = torch.tensor([1.0, 5.0, -2.0]), torch.tensor([0.0, 2.0, 0.0])
    model, vector = nn.Sequential(nn.Identity(), nn.Linear(3, 2)), SteeringVector({"0": v, "1:in": v})
    means = {"plain": {"0": mean, "1:in": mean}, "vector": SteeringVector({"0": mean, "1:in": mean}), "one": mean}
    for around in means.values():
        with Steerer(model, vector, intervention=Ablate(around=around), sites="0"):
            steered = model[0](X)
        model(X)
        expected = X.clone()
        expected[:, 1] = 5.0
        torch.testing.assert_close(steered, expected)
    half = Ablate(around=mean)(X, v, torch.tensor(0.5))
    torch.testing.assert_close(half[:, 1], (X[:, 1] + 5.0) / 2)
    sided = Ablate(around=mean, one_sided=True)(X * 10, v, torch.tensor(1.0))
    torch.testing.assert_close(sided[:, 1], (X[:, 1] * 10).clamp(max=5.0))
    for one in (Ablate(around=mean), Ablate(around=mean, one_sided=True)):
        torch.testing.assert_close(one.prepare(v, torch.tensor(0.5))(X), one(X, v, torch.tensor(0.5)))


def test_around_a_mean_it_can_be_folded_and_gated_and_kept_in_norm():
    torch.manual_seed(0)
    model, mean = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.tensor([1.0, 5.0, -2.0])
    v, rule = SteeringVector({"0": torch.tensor([0.0, 2.0, 1.0])}), Ablate(around={"0": mean})
    folded = fold(model, v, verify_on=X, intervention=rule)
    with Steerer(model, v, intervention=rule):
        torch.testing.assert_close(model(X), folded(X))
    with Steerer(model, v, intervention=KeepNorm(Ablate(around=mean)), gate=CosineAbove(v, -2.0)):
        model(X)
    with Steerer(model, VectorBank({"a": v, "b": v}), intervention={"a": rule, "b": Add()}):
        model(X)


def test_means_that_do_not_fit_are_refused():
    mean, v = torch.ones(3), SteeringVector({"0": torch.ones(3)})
    for wrong, error in (([1.0], TypeError), (3.0, TypeError), (mean[None], ShapeError), (mean.long(), ShapeError)):
        with pytest.raises(error, match="around: expected a"):
            Ablate(around=wrong)
    with pytest.raises(ShapeError, match="around: expected a finite"):
        Ablate(around={"0": mean / 0})
    model = nn.Sequential(nn.Identity())
    with pytest.raises(SiteNotFoundError, match=r"around has nothing for site '0'"):
        Steerer(model, v, intervention=Ablate(around={"1": mean}))
    with pytest.raises(ShapeError, match="around: it has 2 features, the direction 3"):
        Steerer(model, v, intervention=Ablate(around=torch.ones(2)))
    with pytest.raises(TypeError, match="it has one for each site"):
        Ablate(around={"0": mean})(X, mean, torch.tensor(1.0))


def test_an_ablation_owns_its_means():
    mean = torch.ones(3)
    one = Ablate(around=mean)
    mean += 1
    assert torch.equal(one.around, torch.ones(3))
    assert Ablate() == Ablate() != Ablate(one_sided=True)
    assert one == one != Ablate(around=torch.ones(3))
    assert len({Ablate(), Ablate(), one}) == 2
