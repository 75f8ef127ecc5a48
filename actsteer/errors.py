"""The errors of steering. Catch `ActsteerError`, or the built-in kind that an error resembles; an argument of a wrong
type or range is a plain TypeError or ValueError.

ActsteerError
├── SiteNotFoundError        (LookupError)   no module, or no direction, has this name
├── ConceptNotFoundError     (LookupError)   the bank has no such concept
├── ShapeError               (ValueError)    a size, rank, dtype or feature axis that does not fit
├── ZeroDirectionError       (ValueError)    a direction of norm zero where one is needed
├── StrengthError            (ValueError)    a strength c that cannot be applied
├── BatchError               (ValueError)    batches that cannot be fed to the model
│   └── InputError           (RuntimeError)  a batch whose width or dtype a module of the model refuses
├── LossError                (ValueError)    a loss that cannot be minimised
├── StatisticsError          (ValueError)    statistics that lack what is asked of them
├── FileFormatError          (ValueError)    a file that is corrupt, foreign or of a newer version
├── ModelMismatchError       (ValueError)    a vector that was made for another model
├── NotFoldable              (ValueError)    a steering that the weights cannot carry
├── OutputError              (TypeError)     a module's output in which no activation can be found
├── UnsupportedModelError    (TypeError)     a model in which hooks would be ignored, or without derivatives
├── AttachedError            (RuntimeError)  attach on a Steerer that is attached already
├── DistributedError         (RuntimeError)  a process of a group that failed, or has other statistics
├── GateError                (RuntimeError)  a gate that has not seen its site yet, or whose weights are no numbers
├── PositionsError           (RuntimeError)  positions that cannot be known in a forward pass
└── SteeringNotApplied       (RuntimeError)  the model ran, and an edit did not
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable

PAGES = "https://actsteer.github.io/actsteer/errors/"


class ActsteerError(Exception):
    """The root of all errors in this library; it is never raised itself.

    The message says what was expected, what came, where, and what to do next. A note below it, which is no part of
    `str(error)`, names the command that explains the class, and its page.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        name = documented(type(self)).__name__  # of a class of the user's own, the one of ours that it refines
        self.add_note(f"`actsteer explain {name}` tells more, as does {PAGES}{name}/")


class SiteNotFoundError(ActsteerError, LookupError):
    """No module, or no direction, has this name.

    What happened: a site is the exact name of a module, and nothing here has this one. The message has close names.

    1. The name is that of another model, or is spelt otherwise.
       Cure: `find_sites(model, "**")` and `actsteer sites MODEL` list the names.
    2. In a pattern, `*` stays between two dots, so that `*.mlp` does not match `layers.0.mlp`.
       Cure: write `**.mlp`, or `layers.*.mlp`.
    3. The model has the site, but the vector, the bank or the statistics of one side have not.
       Cure: `.sites` of each lists what it has; collect both sides, and fit, at the sites that you steer.

    >>> from torch import nn
    >>> from actsteer import find_sites
    >>> model = nn.ModuleDict({"layers": nn.Sequential(nn.ModuleDict({"mlp": nn.Linear(2, 2)}))})
    >>> try:
    ...     find_sites(model, "*.mlp")
    ... except SiteNotFoundError as error:
    ...     print(error)
    ModuleDict has no site '*.mlp'. `*` stays between two dots, and `**` does not: ['layers.0.mlp']
    >>> find_sites(model, "**.mlp")
    ('layers.0.mlp',)
    """


class ConceptNotFoundError(ActsteerError, LookupError):
    """The bank has no such concept.

    What happened: concepts are the keys of a bank, and `c`, `gate`, `intervention` and `positions` may be mappings from
    them; this key is none of them.

    1. The name is spelt otherwise.
       Cure: `bank.concepts` lists the names, and `actsteer show FILE` those of a file.
    2. The mapping has sites for keys.
       Cure: map concepts to strengths, `c={"nine": 2.0}`; `v.select(site)` and `sites=` choose the sites.
    3. The vector was made without `concept=`, and is called "vector".
       Cure: give one number, `c=2.0`, or name the vector: `fit(..., concept="nine")`.
    """


class ShapeError(ActsteerError, ValueError):
    """A size, rank, dtype or feature axis that does not fit.

    What happened: a tensor has another shape or dtype than its place asks for. The message names the site, and both.

    1. The vector is of another model or of another site, whose activation has another number of features.
       Cure: fit it at this site of this model, or load the model that it was made for.
    2. The features do not lie on the last axis, or several axes have as many entries, as in a map of 8 x 8 x 8.
       Cure: say where they lie: `Steerer(model, v, axis=1)`, and the same in `collect` and `fit`.
    3. A direction has a row too many, as in `hidden[:1]`, or it is not floating.
       Cure: a direction is 1-D: take `hidden[0]`, or `hidden.mean(dim=0)`, and `.float()`.

    >>> import torch
    >>> from actsteer import Steerer, SteeringVector
    >>> model, x = torch.nn.Sequential(torch.nn.Identity()), torch.zeros(2, 3, 5)  # 3 channels at 5 places
    >>> v = SteeringVector({"0": torch.ones(3)})
    >>> try:
    ...     with Steerer(model, v):
    ...         model(x)
    ... except ShapeError as error:
    ...     print(error)
    site '0': the activation has 5 features (axis -1 of shape (2, 3, 5)), the vector 3; was it fitted on another model?
    If the features lie on axis 1, pass axis={'0': 1}
    >>> with Steerer(model, v, axis=1):
    ...     steered = model(x)
    """


class ZeroDirectionError(ActsteerError, ValueError):
    """A direction of norm zero where one is needed.

    What happened: an angle, a unit vector or a projection was asked for, and zero has none.

    1. The positive and the negative side have the same mean at this site.
       Cure: `v[site].norm()` shows where; leave the site out, or fit at later ones, or at positions that differ.
    2. One concept of a bank is a combination of those before it, and `orthogonalize` leaves nothing of it.
       Cure: leave it out: `bank.select(...)` of the others.
    3. `Ablate`, `Clamp` or another intervention along a direction meets a vector that is zero at one of its sites.
       Cure: leave the site out: `v.select(...)` of the others, or `sites=`.
    """


class StrengthError(ActsteerError, ValueError):
    """A strength `c` that cannot be applied.

    What happened: `c` is one number, a tensor with one for each row, or for each row and position, or a callable of the
    generation step; this is none, or does not fit the batch or the dtype.

    1. `c` is a list.
       Cure: `torch.tensor(c)` is one strength for each row of the batch; `sweep(model, v, c=[0, 1, 2], evaluate=...)`
       tries one after another.
    2. `c` has other rows than the batch.
       Cure: give one number, or as many as the batch has rows; with beams, rows are repeated.
    3. `c` is infinite or no number, or `c · v` is too large for the dtype of the activation, such as float16.
       Cure: give a smaller `c`, or `v.unit()`; in bfloat16 and float32 there is room.

    >>> import torch
    >>> from actsteer import Steerer, SteeringVector
    >>> v, model = SteeringVector({"0": torch.tensor([1.0, 0.0])}), torch.nn.Sequential(torch.nn.Identity())
    >>> with Steerer(model, v, c=torch.tensor([1.0, 2.0])):  # and not c=[1.0, 2.0]
    ...     model(torch.zeros(2, 2))
    tensor([[1., 0.],
            [2., 0.]])
    """


class BatchError(ActsteerError, ValueError):
    """Batches that cannot be fed to the model.

    What happened: batches are one tensor, or an iterable of inputs, each of them a tensor, a tuple of positional or a
    mapping of keyword arguments; the model cannot be called with these.

    1. A DataLoader gives (inputs, labels), and the model would be called with both.
       Cure: give the inputs alone, `[x for x, y in loader]`, and the labels as `by=` or `targets=`.
    2. The inputs are texts, or lists of ids.
       Cure: `text_batches` and `fit_pairs` of actsteer.integrations.transformers take texts; for one batch, call the
       tokenizer with `return_tensors="pt"` and `padding=True`.
    3. There are no batches, since a generator is used up after one pass.
       Cure: give a list, or make the generator anew.
    """


class InputError(BatchError, RuntimeError):
    """A batch whose width or dtype a module of the model refuses.

    What happened: the model ran, and the module that the message names was given a tensor that it cannot take. What
    torch says of it comes last.

    1. The rows have another shape, as images do that a network takes as rows.
       Cure: `x.flatten(start_dim=1)`, or what else the model's own training does to them.
    2. The dtype is another: numpy's numbers are float64, and the model's float32 or bfloat16.
       Cure: `x.float()`, or `x.to(model.dtype)` of a Hugging Face model.
    3. Token ids lie outside of the vocabulary, or are no integers.
       Cure: use the tokenizer of this model, and keep the dtype of its ids.
    """


class LossError(ActsteerError, ValueError):
    """A loss that cannot be minimised.

    What happened: `optimize` needs one number, with gradients that reach what it trains.

    1. The loss has a number for each row.
       Cure: take their mean: `loss=lambda output: (output - goal).square().mean()`.
    2. The loss cuts the gradients, as `argmax`, `item`, `detach` and `torch.no_grad` do.
       Cure: use the logits themselves, as `torch.nn.functional.cross_entropy` does.
    3. The loss reads a part of the output that does not depend on the site.
       Cure: choose an earlier site, or another part.
    """


class StatisticsError(ActsteerError, ValueError):
    """Statistics that lack what is asked of them.

    What happened: the sums that `collect` has kept do not tell this, or there is nothing to sum.

    1. A covariance is needed, and none was kept.
       Cure: `collect(..., covariance=True)`; or call `fit`, which keeps what its estimator reads.
    2. The site never ran on these batches.
       Cure: the message names it, and why that may be; choose another one, such as the module around it.
    3. There are too few rows, rows that are all the same, or numbers that are not finite.
       Cure: collect more; `record(model, batches, sites=site)[site].isfinite().all()` tells the last.
    """


class FileFormatError(ActsteerError, ValueError):
    """A file that is corrupt, foreign, or of a newer version.

    What happened: the file cannot be read as what was asked for, or cannot be written as what its suffix says.

    1. The suffix is that of no format, or of one that is only read, such as .pt.
       Cure: save as .safetensors, which holds everything, or one vector as .gguf, for llama.cpp.
    2. The file was cut off while it was copied, or altered since it was written.
       Cure: copy it again, and compare the sizes; a few lines of text are a pointer of Git LFS: `git lfs pull`.
    3. The file holds something else: statistics, a whole bank, or objects of classes that are not known here.
       Cure: `Statistics.load`, `VectorBank.load` or `Steering.load`, as the message says; `kinds=` for your classes.
    """


class ModelMismatchError(ActsteerError, ValueError):
    """A vector that was made for another model.

    What happened: a vector carries the fingerprint of its model, and this model has another class or other shapes.
    Other weights of the same shapes only warn.

    1. The vector was fitted on a model of another size, or of another family.
       Cure: load the model that the message names, or fit the vector on this one.
    2. The model was changed after the fit: layers were added, taken out, or widened.
       Cure: fit the vector anew.
    3. It is meant, and the sites correspond to each other.
       Cure: `align` learns a map between the models, and `transport` carries the vector over. If the features are known
       to be the same, `SteeringVector({site: v[site] for site in v})` is a vector without a fingerprint.
    """


class NotFoldable(ActsteerError, ValueError):  # noqa: N818  (the contract's name)
    """A steering that the weights cannot carry.

    What happened: weights treat all rows and tokens alike, and are an affine map; this steering is more, or the fold
    could not be proved on `verify_on`. The model is as it was.

    1. The steering has a gate, positions, or a strength for each row or step.
       Cure: fold without them, or keep the Steerer.
    2. The intervention is no affine map of the activation, as `KeepNorm` and one-sided ones are not.
       Cure: fold `Add`, `Ablate`, `Clamp`, `LowRank` or `Affine`.
    3. No layer of weights is next to the site: a nonlinear module stands between.
       Cure: the message names what stands there; steer the output of a linear layer, or the residual stream.
    """


class OutputError(ActsteerError, TypeError):
    """A module's output in which no activation can be found.

    What happened: what the module takes or gives is no floating tensor, and holds none that alone can be meant.

    1. It is made of integers, such as the ids that an embedding takes.
       Cure: steer what the module gives, without `:in`, or a later module.
    2. It holds several activations.
       Cure: name the part, as the message does: `block:out.hidden`.
    3. It is an object of a class that torch does not know.
       Cure: choose a module inside, or register the class with `torch.utils._pytree.register_pytree_node`.
    """


class UnsupportedModelError(ActsteerError, TypeError):
    """A model in which hooks would be ignored, or without the derivatives that are asked for.

    What happened: the edit could not be attached, would be lost, or what was asked for is not in this model.

    1. The model is scripted or exported, and calls no Python.
       Cure: steer the model that it was made from, and script or export what `fold` returns.
    2. It is no torch module, but a pipeline, a wrapper, or a model's name.
       Cure: give the module inside, such as `pipeline.model`.
    3. `residual_sites` and its like do not find the blocks, for they have other names, or there are two lists of them.
       Cure: name the sites: `find_sites(model, "decoder.layers.*")`.
    """


class AttachedError(ActsteerError, RuntimeError):
    """`attach` on a Steerer that is attached already.

    What happened: this needs the plain model, or a Steerer that is not in use.

    1. `attach` was called, or a block entered, on a Steerer that is attached.
       Cure: `steerer.detach()` first; change `steerer.c` as it is; or make a second Steerer, and both are applied.
    2. `fold`, `calibrate`, `look` or `check` was called inside of a steered block.
       Cure: call it after the block.
    3. A Steerer whose name was lost, as in a notebook, is still attached.
       Cure: `steerers(model)` lists them, and `detach_all(model)` takes them off.
    """


class DistributedError(ActsteerError, RuntimeError):
    """A process of a group that failed, or has other statistics than the rest.

    What happened: the processes work in step, and one of them did not. All of them say so, instead of waiting forever.

    1. Another rank raised an error.
       Cure: the message names the rank and repeats its error; that one is to be mended.
    2. The ranks make different calls, or collect at different sites.
       Cure: make the same calls in the same order on every rank, none of them under `if rank == 0`.
    3. A rank did not come, or has left: it was killed, ran out of memory, or has fewer batches of a sharded model.
       Cure: read what that rank said last. If it is only slow, give `init_process_group` a longer `timeout`.
    """


class GateError(ActsteerError, RuntimeError):
    """A gate that has not seen its site yet, or whose weights are no finite numbers, one per row.

    What happened: a gate decides from what it reads in the same pass, and here it could not.

    1. The gate reads a site that runs after the steered one.
       Cure: fit the gate at the steered site or at an earlier one.
    2. A gate of your own returns another shape than (rows,), or the activation that it reads is not finite.
       Cure: return one finite weight, or bool, for each row.
    3. A loop of your own decodes with a cache, so that the prompt is not in this pass.
       Cure: call `model.generate`, or let the gate decide with `per="token"`.
    """


class PositionsError(ActsteerError, RuntimeError):
    """Positions that cannot be known in a forward pass.

    What happened: where the prompt ends, which tokens are pads, or what came before is not said in this call.

    1. A loop of your own decodes with a cache, and positions such as "last" or "generated" count from the prompt's end.
       Cure: call `model.generate`, count from the start (an index or a slice), or run without a cache.
    2. In such a loop, the attention mask is that of the new token alone.
       Cure: pass the mask of all tokens so far, as `generate` does.
    3. Positions are a callable, which reads all inputs, and a cache or a prefill in chunks hides the earlier ones.
       Cure: call `model.generate` without chunks, or give a mask, an index or a slice.
    """


class SteeringNotApplied(ActsteerError, RuntimeError):  # noqa: N818  (the contract's name)
    """The model ran, and an edit did not.

    What happened: the block ended, and a site had not run since the model was steered, so that what the model returned
    is not what you asked for.

    1. The module does not run on these inputs: another branch, an encoder alone, a layer that was dropped.
       Cure: steer a module that runs. If some calls are meant to pass it by, `Steerer(..., strict=False)`.
    2. The model reads the module's weights, or calls its `forward`, as fused layers do, and not the module.
       Cure: steer the module around it.
    3. The module was replaced while it was steered.
       Cure: quantise, adapt and replace first, and attach then.
    """


def documented(kind: type[ActsteerError]) -> type[ActsteerError]:
    """The class, or the nearest of its bases, that has a page."""
    return next(own for own in kind.__mro__ if own.__module__ == __name__)


def explained(name: str | None = None) -> str:
    """What `actsteer explain` prints: what happened, the causes, their cures and the page; or the tree of all errors.

    Raises:
        LookupError: no error has this name.
    """
    if name is None:
        return f"{inspect.cleandoc(__doc__ or '')}\n\n`actsteer explain NAME` tells more of one, as does {PAGES}"
    kinds = {own: kind for own, kind in globals().items() if inspect.isclass(kind) and issubclass(kind, ActsteerError)}
    if name not in kinds:
        raise LookupError(f"no error is called {name!r}. {close_names(name, kinds)}")
    return f"{name}: {inspect.getdoc(kinds[name])}\n\n{PAGES}{name}/"


def close_names(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the names nearest to one that was not found.

    >>> close_names("layers.0.mpl", ["layers.0.mlp", "head"])
    "Close names: 'layers.0.mlp'."
    """
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    if close:
        return f"Close names: {', '.join(map(repr, close))}."
    shown = ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
    return f"There are: {shown or 'none'}."
