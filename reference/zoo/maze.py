"""Maze: a mouse that has learned to fetch the cheese is steered past it, to the exit.

The vector: activations in mazes with cheese less those in the same mazes without, one number per channel. The truth:
the same mazes without cheese, in which the mouse goes to the exit. After the cheese vector of Turner et al. 2023
(arXiv 2310.08043), who subtract a whole activation map, of one maze.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from actsteer import Steerer, VectorBank, fit
from reference.controls import beside, dealt
from reference.style import STEERED, UNSTEERED, shades
from reference.zoo.doses import doses, draw_doses
from reference.zoo.finding import Finding, Row

SIDE, WALLS, EXIT = 7, 0.2, 6
"""Squares along an edge, the share that are walls, and the exit's square: the last of the first row."""
STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))
BLOCKS, CHANNELS = 8, 24
SITES = "blocks.*:in"
STRENGTHS = (-0.5, -1.0, -1.5, -2.0)


@dataclass(frozen=True)
class Mazes:
    """`walls` (n, 7, 7), and the squares of mouse and cheese, (n,); a cheese of -1 is none."""

    walls: Tensor
    mouse: Tensor
    cheese: Tensor

    def __len__(self) -> int:
        return len(self.mouse)

    def seen(self) -> Tensor:
        """What the mouse sees: (n, 4, 7, 7), a plane each for walls, mouse, cheese and exit."""
        places = (self.mouse, self.cheese, torch.full_like(self.mouse, EXIT))
        return torch.stack([self.walls.float(), *(_plane(place).float() for place in places)], dim=1)

    def emptied(self) -> Mazes:
        """The same mazes without cheese."""
        return replace(self, cheese=torch.full_like(self.cheese, -1))

    def goal(self) -> Tensor:
        """Where the mouse is taught to go: to the cheese, and without one to the exit."""
        return torch.where(self.cheese < 0, EXIT, self.cheese)


def make(count: int, *, generator: torch.Generator) -> Mazes:
    """Mazes with cheese in which mouse, cheese and exit lie on three squares, with ways between them."""
    walls = torch.rand(2 * count, SIDE, SIDE, generator=generator) < WALLS
    walls[:, 0, SIDE - 1] = False
    far = distances(walls, torch.full((len(walls),), EXIT)).flatten(1)
    reached = (far < SIDE * SIDE) & (far > 0)
    enough = (reached.sum(dim=1) > 5).nonzero()[:count, 0]
    mouse, cheese = torch.multinomial(reached[enough].float(), 2, generator=generator).unbind(dim=1)
    return Mazes(walls[enough], mouse, cheese)


def distances(walls: Tensor, goal: Tensor) -> Tensor:
    """Steps from every square to the goal, (n, 7, 7); 49 where there is no way."""
    far = torch.where(_plane(goal), 0, SIDE * SIDE)
    for _ in range(SIDE * SIDE):
        nearer = torch.minimum(far, _beside(far).amin(dim=1) + 1).masked_fill(walls, SIDE * SIDE)
        if torch.equal(nearer, far):
            break
        far = nearer
    return far


class Policy(nn.Module):
    """Residual 3 x 3 convolutions, and one that gives every square four logits; those of the mouse's square count."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(BLOCKS))
        self.head = nn.Conv2d(CHANNELS, len(STEPS), 1)

    def forward(self, seen: Tensor) -> Tensor:
        h = self.stem(seen)
        for block in self.blocks:
            h = h + block(h.relu())
        logits: Tensor = (self.head(h.relu()) * seen[:, 1:2]).sum(dim=(2, 3))
        return logits


def train(*, seed: int, steps: int, batch_size: int = 192) -> Policy:
    """A policy that imitates the shortest ways, to the cheese in half of the mazes, to the exit in those without."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        mazes = make(batch_size, generator=generator)
        eaten = torch.rand(len(mazes), generator=generator) < 0.5
        mazes = replace(mazes, cheese=mazes.cheese.masked_fill(eaten, -1))
        around = _beside(distances(mazes.walls, mazes.goal())).flatten(2)
        around = around[torch.arange(len(mazes)), :, mazes.mouse]
        best = (around == around.amin(dim=1, keepdim=True)).float()
        optimizer.zero_grad()
        F.cross_entropy(policy(mazes.seen()), best / best.sum(dim=1, keepdim=True)).backward()
        optimizer.step()
        schedule.step()
    return policy.eval().requires_grad_(False)


@torch.inference_mode()
def walk(policy: nn.Module, mazes: Mazes, *, until: Tensor, seed: int, moves: int = 60) -> Tensor:
    """The squares of every episode, (up to moves + 1, n): it ends at the square of `until` or at the exit.

    The mouse draws its moves from the policy's probabilities; against a wall it stays where it is.
    """
    generator = torch.Generator().manual_seed(seed)
    steps, rows, squares = torch.tensor(STEPS), torch.arange(len(mazes)), [mazes.mouse]
    for _ in range(moves):
        mouse = squares[-1]
        going = (mouse != until) & (mouse != EXIT)
        if not going.any():
            break
        chances = policy(replace(mazes, mouse=mouse).seen()).softmax(dim=1)
        step = steps[chances.multinomial(1, generator=generator)[:, 0]]
        there = torch.stack([mouse // SIDE, mouse % SIDE], dim=1) + step
        row, column = there.clamp(0, SIDE - 1).unbind(dim=1)
        free = (there >= 0).all(dim=1) & (there < SIDE).all(dim=1) & ~mazes.walls[rows, row, column]
        squares.append(torch.where(going & free, row * SIDE + column, mouse))
    return torch.stack(squares)


def ends(squares: Tensor, cheese: Tensor) -> dict[str, float]:
    """The share of episodes that end where the cheese lies, or would lie, at the exit, and at neither."""
    at_cheese, at_exit = squares[-1] == cheese, squares[-1] == EXIT
    found = {"cheese": at_cheese, "exit": at_exit, "neither": ~(at_cheese | at_exit)}
    return {name: float(own.double().mean()) for name, own in found.items()}


def run(*, steps: int = 300, episodes: int = 300, seed: int = 0) -> Finding:
    """Train the policy, fit the vector in mazes of its own, and let the mouse walk in others."""
    policy = train(seed=seed, steps=steps)
    generator = torch.Generator().manual_seed(seed + 1)
    known, new = (make(count, generator=generator) for count in (1000, episodes))
    find = partial(fit, policy, sites=SITES, progress=False)
    with_cheese, without = known.seen(), known.emptied().seen()
    v = find(positive=with_cheese, negative=without, concept="cheese")
    positive, negative = dealt(with_cheese, without)
    bank = VectorBank({"cheese": v})
    controls = beside(bank, VectorBank({"cheese": find(positive=positive, negative=negative)}))
    go = partial(walk, until=new.cheese, seed=seed)
    rows = doses(
        policy, {"cheese": bank, **controls}, c=STRENGTHS, evaluate=lambda model: ends(go(model, new), new.cheese)
    )
    rows.append({"steering": "no cheese there", "c": None, **ends(go(policy, new.emptied()), new.cheese)})
    paths = {"not steered": go(policy, new)}
    with Steerer(policy, v, c=-1.0):
        paths["c = -1"] = go(policy, new)
    return Finding(
        "a mouse steered past the cheese: share of episodes by where they end", rows, partial(_draw, rows, new, paths)
    )


def _draw(rows: Sequence[Row], mazes: Mazes, paths: Mapping[str, Tensor]) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    *lines, maze = figure.subplots(1, 3)
    for axes, column in zip(lines, ("cheese", "exit"), strict=True):
        draw_doses(axes, rows, column, label=f"share that end at the {column}")
        axes.set_ylim(-0.03, 1.03)
    figure.legend(*lines[0].get_legend_handles_labels(), loc="outside lower left", ncols=5)
    plain, steered = (squares[-1] for squares in paths.values())
    turned = (plain == mazes.cheese) & (steered == EXIT)
    shown = int((turned * (paths["not steered"].diff(dim=0) != 0).sum(dim=0)).argmax())
    maze.imshow(mazes.walls[shown].numpy(), cmap=shades(), vmax=3)
    for (name, squares), color in zip(paths.items(), (UNSTEERED, STEERED), strict=True):
        path = squares[:, shown].numpy()
        maze.plot(path % SIDE, path // SIDE, color=color, lw=3, alpha=0.8, label=name)
    label = {"boxstyle": "round,pad=0.15", "facecolor": maze.get_facecolor(), "edgecolor": "none"}
    for text, square in {
        "mouse": mazes.mouse[shown],
        "cheese": mazes.cheese[shown],
        "exit": torch.tensor(EXIT),
    }.items():
        maze.text(int(square % SIDE), int(square // SIDE), text, ha="center", va="center", bbox=label)
    maze.set_xticks([])
    maze.set_yticks([])
    maze.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2)
    return figure


def _plane(square: Tensor) -> Tensor:
    """(n, 7, 7): true at the square; nowhere for -1."""
    plane: Tensor = (torch.arange(SIDE * SIDE) == square[:, None]).unflatten(1, (SIDE, SIDE))
    return plane


def _beside(far: Tensor) -> Tensor:
    """(n, 4, 7, 7): the distance of the square to which each move leads, that of walls and of the outside."""
    padded = F.pad(far, (1, 1, 1, 1), value=SIDE * SIDE)
    return torch.stack([padded[:, 1 + r : 1 + r + SIDE, 1 + c : 1 + c + SIDE] for r, c in STEPS], dim=1)
