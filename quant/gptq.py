"""GPTQ: a weight matrix and the second moments of its inputs in, integer codes and scales out.

Pure functions over tensors; knows nothing of models, files or progress. Shapes: K input features,
N output features, G groups, T tokens. The steps, each for all output features at once:

1. Factorize the damped Hessian, once for all layers that read the same inputs. Frantar et al.
   2022, "GPTQ" (arXiv:2210.17323), section 3.3.
2. Move the target: where the inputs already carry the errors of earlier layers, the weight that
   gives the 16-bit model's outputs is not W but W + E (H + damping)^-1, the least-squares solution
   with E = sum (wanted output - W x) x^T. This is the asymmetric calibration of Li et al. 2025,
   "GPTAQ" (arXiv:2504.02692), in closed form, and any other wanted output fits in the same way.
3. Find a grid for every group (`grid.py`), then go column by column, each rounding error spread
   over the columns still to come (the GPTQ paper's algorithm 1).
4. Coordinate descent: go over the columns again, each code set to the best one given all others,
   each group's scale refitted. Behdin et al. 2023, "QuantEase" (arXiv:2309.01885), section 3,
   does this from a nearest rounding; GPTQ's codes are a better start.

What each is worth stands in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from ..kernels.packing import PackedWeight, num_groups, pack_codes
from .config import ModuleConfig
from .devices import CPU
from .errors import SolverError
from .grid import Grid, GridSearch, round_scale
from .products import PRECISIONS

BLOCK_SIZE = 128  # columns whose updates of the rest are applied together (paper, section 3.3)
FACTOR_ROWS = 512  # of a Hessian's factor that are found together
ROWS_AT_ONCE = 4096  # output features solved together
SOLVED_AT_ONCE = 1 << 21  # their weights, at most
SOLVED_AT_ONCE_ON_GPU = 1 << 26  # 2.4 GB of working memory
ROUNDED_AT_ONCE = 1 << 22  # weights of a matrix that are rounded to nearest together
MAX_DAMP_PERCENT = 1.0
DAMP_STEP = 10.0
ACT_ORDERS = ("static", "group", "none")
SCALE_SEARCHES = ("hessian", "norm", "none")
DRIFTS = ("none", "inputs", "stream")


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverConfig:
    """How codes are found; nothing here changes what a checkpoint's numbers mean.

    Raises SolverError by field name.
    """

    damp_percent: float = 0.01  # of the Hessian's mean diagonal, added to its diagonal
    # Which column comes first. "static": inputs by falling importance, grids found beforehand.
    # "group": groups by falling importance, inputs within a group too, grids found on the weights
    # as compensated so far (arXiv:2505.14638). "none": left to right, such grids too. In all three
    # a group is `group_size` neighbouring inputs, so the order costs nothing at run time.
    act_order: str = "static"
    # What a grid's range minimises: the squared error weighted by what it costs after compensation
    # (see `_importance`), a norm of the error, or nothing (the range covers all weights).
    scale_search: str = "hessian"
    scale_norm: float = 2.4  # of "norm"
    signed_scales: bool = True  # symmetric grids use their extra code on the largest weight
    descent_sweeps: int = 4  # of coordinate descent over all columns
    # What the layers of a model make up for beside their own rounding: nothing ("none"), what their
    # inputs have lost to earlier layers ("inputs"), or also what the residual stream has that their
    # outputs are added to ("stream"). Read by whoever sums the drifts up.
    drift: str = "stream"
    # What linear layers compute in while the calibration text passes through them: see `products`.
    precision: str = "auto"
    # Of the calibration text, the drift is measured on as many tokens at most; None: on all.
    drift_tokens: int | None = None

    def __post_init__(self) -> None:
        damp, norm, sweeps = self.damp_percent, self.scale_norm, self.descent_sweeps
        if not 0 <= damp < 1:
            raise SolverError(f"damp_percent is {damp!r}; it must lie in [0, 1)")
        if self.act_order not in ACT_ORDERS:
            known = ", ".join(ACT_ORDERS)
            raise SolverError(f"act_order is {self.act_order!r}; it must be one of {known}")
        if self.scale_search not in SCALE_SEARCHES:
            known = ", ".join(SCALE_SEARCHES)
            raise SolverError(f"scale_search is {self.scale_search!r}; it must be one of {known}")
        if self.drift not in DRIFTS:
            raise SolverError(f"drift is {self.drift!r}; it must be one of {', '.join(DRIFTS)}")
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise SolverError(f"precision is {self.precision!r}; it must be one of {known}")
        if not 1 <= norm <= 8:
            raise SolverError(f"scale_norm is {norm!r}; it must lie in [1, 8]")
        if self.drift_tokens is not None and self.drift_tokens < 1:
            raise SolverError(f"drift_tokens is {self.drift_tokens!r}; it must be at least 1")
        if not 0 <= sweeps <= 100:
            raise SolverError(f"descent_sweeps is {sweeps!r}; it must lie in [0, 100]")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """The solver's own codes: they are packed as they are, never derived again from floats."""

    bits: int
    group_size: int  # never -1
    codes: Tensor  # [K, N] uint8
    scales: Tensor  # [G, N] fp16, each exact in bfloat16 too
    zeros: Tensor  # [G, N] uint8, the code that stands for zero

    def dequantize(self) -> Tensor:
        """[N, K] fp32"""
        groups = torch.arange(self.codes.shape[0], device=self.codes.device) // self.group_size
        centered = self.codes.to(torch.float32) - self.zeros.to(torch.float32)[groups]
        return (centered * self.scales.to(torch.float32)[groups]).t().contiguous()

    def pack(self, bias: Tensor | None = None) -> PackedWeight:
        in_features, out_features = self.codes.shape
        return PackedWeight(
            bits=self.bits,
            group_size=self.group_size,
            in_features=in_features,
            out_features=out_features,
            qweight=pack_codes(self.codes, self.bits),
            scales=self.scales,
            zeros=self.zeros,
            bias=bias,
        )

    def split(self, sizes: list[int]) -> list[QuantizedWeight]:
        """Cut the layer along N."""
        parts = (tensor.split(sizes, 1) for tensor in (self.codes, self.scales, self.zeros))
        return [
            replace(self, codes=codes, scales=scales, zeros=zeros)
            for codes, scales, zeros in zip(*parts, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """One linear layer, solved."""

    quantized: QuantizedWeight
    lost: float  # squared error of the output on the calibration inputs, ||(T - Q) X||^2
    energy: float  # squared output, ||W X||^2
    damp_percent: float  # the damping that worked
    fallback: str | None = None  # why the layer was rounded to nearest instead, if it was

    @property
    def relative_error(self) -> float:
        return self.lost / self.energy if self.energy > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """What the solver needs of a Hessian; one serves every layer that reads the same inputs."""

    order: Tensor  # [K] int64: the j-th visited input feature
    # L^-1, see `factorize`: panels of FACTOR_ROWS rows, up to their last diagonal element.
    root: Sequence[Tensor]  # [rows, end] fp64
    damping: float  # what was added to the diagonal
    damp_percent: float  # the damping that worked, at least what was asked for

    def rows(self, start: int, end: int) -> Tensor:
        """Rows of U, [end - start, K] fp32, with inverse(H + damping) = U^T U in visiting order."""
        size = len(self.order)
        end = min(end, size)
        found = torch.zeros(end - start, size, device=self.order.device)
        first, last = size - end, size - start  # of the root's rows, which are U's backwards
        for i, panel in enumerate(self.root):
            above = i * FACTOR_ROWS
            rows = panel[max(first - above, 0) : max(last - above, 0)]
            place = above + max(first - above, 0) - first
            found[place : place + len(rows), : panel.shape[1]] = rows
        return found.flip(0, 1)

    def conditional_curvature(self) -> Tensor:
        """1 / inverse(H + damping)_kk, [K] fp32, in the features' own order."""
        visited = torch.zeros(len(self.order), dtype=torch.float64, device=self.order.device)
        for panel in self.root:
            for rows in panel.split(BLOCK_SIZE):
                visited[: panel.shape[1]] += rows.square().sum(dim=0)
        own = torch.empty_like(visited)
        own[self.order] = 1 / visited.flip(0)
        return own.to(torch.float32)


def solve(
    weights: Sequence[Tensor],
    hessian: Tensor,
    modules: Sequence[ModuleConfig],
    config: SolverConfig | None = None,
    *,
    drifts: Sequence[Tensor] | None = None,
    drift_hessian: Tensor | None = None,
    fallback: str | None = None,
) -> list[Solution]:
    """Quantize the linear layers that read the same inputs. weights [N_i, K] fp32, hessian [K, K].

    Rows do not influence each other: one Hessian and one factorization serve all layers, and any
    slice of a layer's rows comes out as it would with the others. `drifts`, [N_i, K] fp32 each, are
    sums over tokens of (wanted output - W x) x^T; without them the wanted output is W x.
    `drift_hessian` is the Hessian of the tokens they are summed over, where that is not `hessian`.

    `fallback` gives the reason why the Hessian must not be trusted: the weights are then rounded
    to nearest, on grids weighted by its diagonal. The same happens, and is said in the solutions,
    when no damping makes the Hessian positive definite. Raises SolverError when a weight or the
    Hessian is not finite. The Hessians and `drifts` may be overwritten. All tensors, and those of
    the solutions, are on one device.
    """
    config = config or SolverConfig()
    if not bool(torch.isfinite(hessian).all()):
        raise SolverError("the Hessian of its inputs holds values that are not finite")
    for weight in weights:
        if not bool(torch.isfinite(weight).all()):
            raise SolverError("its weight holds values that are not finite")
    trusted = fallback is None
    dead = (hessian.diagonal() == 0) & trusted
    factors: dict[int, Factor] = {}
    solutions: dict[int, Solution] = {}
    if drifts is not None and drift_hessian is not None and fallback is None:
        fallback = _retarget_all(drifts, drift_hessian, config.damp_percent)
    layers = list(zip(weights, modules, strict=True))
    for module in dict.fromkeys(modules):
        size = hessian.shape[0] if module.group_size == -1 else module.group_size
        key = size if config.act_order == "group" else 0
        if fallback is None and key not in factors:
            order = _visiting_order(hessian.diagonal(), config.act_order, size)
            try:
                factors[key] = factorize(hessian, order, config.damp_percent)
            except SolverError as error:
                fallback = str(error)
        factor = None if fallback is not None else factors[key]
        problem = _Problem(
            hessian=hessian,
            dead=dead,
            factor=factor,
            importance=_importance(hessian, factor, config.scale_search),
            group_size=size,
            grids=_grid_search(module, config),
            config=config,
        )
        own = [i for i, (_, other) in enumerate(layers) if other == module]
        moves = None if drifts is None or factor is None else [drifts[i] for i in own]
        if moves is not None and factor is not None and drift_hessian is None:
            for move in moves:
                _retarget(move, factor)
        found = _solve_in_slices(problem, [weights[i] for i in own], moves, fallback)
        solutions |= zip(own, found, strict=True)
    return [solutions[i] for i in range(len(layers))]


def round_to_nearest(
    weight: Tensor,
    module: ModuleConfig,
    config: SolverConfig | None = None,
    *,
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """The nearest codes on searched grids, with no Hessian. weight [N, K], importance [K].

    `importance` says what a squared error in each input feature counts; all the same without it.
    The weight, of any floating dtype, is converted a group of some rows at a time: K may be a
    vocabulary. Raises SolverError when a weight is not finite.
    """
    num_rows, num_features = weight.shape
    size = num_features if module.group_size == -1 else module.group_size
    if importance is None or not bool((importance > 0).any()):
        importance = torch.ones(num_features, device=weight.device)
    search = _grid_search(module, config or SolverConfig())
    shape = (num_groups(num_features, size), num_rows)
    codes, scales, zeros = _empty_codes(num_features, shape, weight.device)
    height = max(1, min(ROWS_AT_ONCE, ROUNDED_AT_ONCE // size))
    for row in range(0, num_rows, height):
        part = slice(row, row + height)
        for group in range(shape[0]):
            columns = slice(group * size, (group + 1) * size)
            values = weight[part, columns].t().to(torch.float32).contiguous()
            if not bool(torch.isfinite(values).all()):
                raise SolverError("its weight holds values that are not finite")
            grid = search.search(values, importance[columns])
            codes[columns, part] = grid.quantize(values).to(torch.uint8)
            scales[group, part], zeros[group, part] = grid.scale, grid.zero
    return QuantizedWeight(
        bits=module.bits, group_size=size, codes=codes, scales=scales, zeros=zeros
    )


def rows_at_once(num_features: int, device: torch.device = CPU) -> int:
    """Output features of a layer that are solved together: many, but not much memory.

    On a GPU each step of the solver takes as long for few rows as for many.
    """
    if device.type != "cpu":
        return max(1, SOLVED_AT_ONCE_ON_GPU // num_features)
    return max(1, min(ROWS_AT_ONCE, SOLVED_AT_ONCE // num_features))


def _empty_codes(
    num_features: int, shape: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [K, N], scales and zeros [G, N] = `shape` to fill, as a `QuantizedWeight` has them."""
    return (
        torch.empty(num_features, shape[1], dtype=torch.uint8, device=device),
        torch.empty(shape, dtype=torch.float16, device=device),
        torch.empty(shape, dtype=torch.uint8, device=device),
    )


def factorize(hessian: Tensor, order: Tensor, damp_percent: float) -> Factor:
    """The damped inverse Hessian's upper Cholesky factor, in visiting order.

    With J the reversal of all rows, J H J = L L^T gives H = (J L J) (J L J)^T, and J L J is upper
    triangular. So inverse(H) = U^T U with U = J L^-1 J: one factorization and one triangular
    inverse, and no inverse of H. `root` is L^-1; both steps are done in fp64.

    Damping adds damp_percent of the mean diagonal; where that does not make the matrix positive
    definite it is raised tenfold, up to MAX_DAMP_PERCENT. Raises SolverError when nothing helps.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean(dtype=torch.float64)) if not bool(dead.all()) else 1.0
    backwards = order.flip(0)
    for damp in _dampings(damp_percent):
        # A feature that was always zero depends on no other: any positive number stands for it.
        added = torch.where(dead[backwards], mean, damp * mean)
        root = _inverse_factor(hessian, backwards, added)
        if root is not None:
            return Factor(order=order, root=root, damping=damp * mean, damp_percent=damp)
    raise SolverError(
        f"the Hessian of its inputs is not positive definite even with damp_percent "
        f"{MAX_DAMP_PERCENT:g}"
    )


def _inverse_factor(hessian: Tensor, order: Tensor, added: Tensor) -> list[Tensor] | None:
    """X = L^-1 for hessian[order][:, order] + diag(added) = L L^T as the panels of a `Factor`.

    None: the matrix is not positive definite. A panel at a time, so that no more than a triangle
    is in memory: with A its rows, its part of L is A X^T of the panels above, and that of X
    is -L_ii^-1 L X before the diagonal.
    """
    root: list[Tensor] = []
    for start in range(0, len(order), FACTOR_ROWS):
        rows = order[start : start + FACTOR_ROWS]
        end = start + len(rows)
        panel = hessian[rows][:, order[:end]].to(torch.float64)
        panel.diagonal(start).add_(added[start:end])
        before, own = panel[:, :start], panel[:, start:]
        lower, inverse = torch.empty_like(before), torch.zeros_like(before)
        parts = lower.split(FACTOR_ROWS, 1) if root else ()
        for above, part in zip(root, parts, strict=True):
            part.copy_(before[:, : above.shape[1]] @ above.t())
        factor, failed = torch.linalg.cholesky_ex(own.addmm_(lower, lower.t(), alpha=-1))
        if int(failed):
            return None
        for above, part in zip(root, parts, strict=True):
            inverse[:, : above.shape[1]].addmm_(part, above)
        unit = torch.eye(len(rows), dtype=torch.float64, device=hessian.device)
        own.copy_(torch.linalg.solve_triangular(factor, unit, upper=False))
        before.copy_(own @ inverse).neg_()
        root.append(panel)
    return root


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """What all rows of one layer share."""

    hessian: Tensor  # [K, K] fp32, undamped
    dead: Tensor  # [K] bool, features that were zero in every token
    factor: Factor | None  # None: round to nearest
    importance: Tensor  # [K] fp32, what an error in each feature counts in the search for grids
    group_size: int  # never -1
    grids: GridSearch
    config: SolverConfig

    @property
    def num_groups(self) -> int:
        return num_groups(len(self.dead), self.group_size)

    @property
    def group_of(self) -> Tensor:
        """[K] int64"""
        return torch.arange(len(self.dead), device=self.dead.device) // self.group_size


def _solve_in_slices(
    problem: _Problem,
    weights: Sequence[Tensor],
    moves: Sequence[Tensor] | None,
    fallback: str | None,
) -> list[Solution]:
    """`moves`, [N_i, K] each: what is added to the weights before they are rounded.

    The rows of all layers are solved as if they were one layer's.
    """
    sizes, num_features = [len(weight) for weight in weights], len(problem.dead)
    num_rows, device = sum(sizes), problem.hessian.device
    codes, scales, zeros = _empty_codes(num_features, (problem.num_groups, num_rows), device)
    row_lost, row_energy = torch.zeros(2, num_rows, dtype=torch.float64, device=device)
    height = rows_at_once(num_features, device)
    for start in range(0, num_rows, height):
        part = slice(start, min(start + height, num_rows))
        original = _rows_of(weights, part).to(torch.float32)
        target = torch.where(problem.dead, 0.0, original)
        if moves is not None:
            target += _rows_of(moves, part)
        columns = target.t().contiguous()
        found, grid = _solve_rows(columns, problem)
        codes[:, part], scales[:, part], zeros[:, part] = found, grid.scale, grid.zero
        error = columns - _dequantize(found, grid, problem.group_of)
        row_lost[part] = _squared_outputs(error.t(), problem.hessian)
        row_energy[part] = _squared_outputs(original, problem.hessian)
    quantized = QuantizedWeight(
        bits=problem.grids.bits,
        group_size=problem.group_size,
        codes=codes,
        scales=scales,
        zeros=zeros,
    )
    return [
        Solution(
            quantized=part,
            lost=max(float(lost.sum()), 0.0),
            energy=float(energy.sum()),
            damp_percent=problem.factor.damp_percent if problem.factor else MAX_DAMP_PERCENT,
            fallback=fallback,
        )
        for part, lost, energy in zip(
            quantized.split(sizes), row_lost.split(sizes), row_energy.split(sizes), strict=True
        )
    ]


def _rows_of(matrices: Sequence[Tensor], part: slice) -> Tensor:
    """Rows of all matrices as if they stood on top of each other, a view where that is possible."""
    found, start = [], 0
    for matrix in matrices:
        first, last = max(part.start - start, 0), min(part.stop - start, len(matrix))
        if first < last:
            found.append(matrix[first:last])
        start += len(matrix)
    return found[0] if len(found) == 1 else torch.cat(found)


def _solve_rows(target: Tensor, problem: _Problem) -> tuple[Tensor, Grid]:
    """Codes [K, N] fp32 and grids [G, N] for the rows whose transposed target is [K, N] fp32."""
    if problem.factor is None:
        grid = _static_grids(target, problem)
        return _nearest(target, grid, problem.group_of), grid
    codes, grid = _column_by_column(target, problem, problem.factor)
    if problem.config.descent_sweeps:
        codes, grid = _coordinate_descent(target, codes, grid, problem, problem.factor.damping)
    return codes, grid


def _column_by_column(target: Tensor, problem: _Problem, factor: Factor) -> tuple[Tensor, Grid]:
    """The paper's algorithm 1, on grids that are found beforehand or when a group is reached."""
    order, group_of = factor.order, problem.group_of
    live = target[order]  # rewritten as errors are spread
    static = problem.config.act_order == "static"
    grid = _static_grids(target, problem) if static else _empty_grid(target, problem)
    codes = torch.empty_like(target)
    groups = group_of[order].tolist()
    # Views made beforehand: a column's arithmetic takes as long as finding its operands.
    grids, rows = [grid[group] for group in range(problem.num_groups)], codes.unbind()
    for start, end, opened in _blocks(groups, whole_groups=not static):
        if opened is not None:
            found = problem.grids.search(live[opened], problem.importance[order[opened]])
            grid.scale[groups[start]], grid.zero[groups[start]] = found.scale, found.zero
        upper = factor.rows(start, end)
        block, within = live[start:end], upper[:, start:end]
        upper /= within.diagonal().clone()[:, None]
        errors, columns = torch.empty_like(block), order[start:end].tolist()
        for j, (value, error) in enumerate(zip(block.unbind(), errors.unbind(), strict=True)):
            own = grids[groups[start + j]]
            code = own.quantize(value, out=rows[columns[j]])
            own.error(value, code, out=error)
            block[j + 1 :].addr_(within[j, j + 1 :], error, alpha=-1)
        live[end:].addmm_(upper[:, end:].t(), errors, alpha=-1)
    return codes, grid


def _coordinate_descent(
    target: Tensor, codes: Tensor, grid: Grid, problem: _Problem, damping: float
) -> tuple[Tensor, Grid]:
    """Lower the damped objective further, one code or one scale at a time. Rewrites its arguments.

    With the errors R = T - Q [K, N], the objective's gradient for R is (H + damping) R up to a
    factor of 2. A code moves to the nearest one of the value that makes its own entry vanish. A
    scale takes the step that makes the slope along its group's codes vanish, if the objective
    still falls after rounding. So no step raises the objective.
    """
    hessian, size = problem.hessian, problem.group_size
    errors = target - _dequantize(codes, grid, problem.group_of)
    slope = (hessian @ errors).add_(errors, alpha=damping)
    del errors
    curvature = hessian.diagonal() + damping
    curvature = torch.where(curvature > 0, curvature, 1.0)  # a dead feature, not damped
    steps, largest = (1 / curvature).tolist(), (1 << grid.bits) - 1
    for _ in range(problem.config.descent_sweeps):
        for group in range(problem.num_groups):
            columns = slice(group * size, min((group + 1) * size, len(target)))
            own = hessian[columns, columns].clone()
            own.diagonal().add_(damping)
            centered = codes[columns] - grid.zero[group]
            step = _scale_step(centered, grid.scale[group], own, slope[columns])
            grid.scale[group] += step
            moved = centered.mul_(step)
            here = torch.addmm(slope[columns], own, moved, alpha=-1).div_(grid.scale[group])
            moved += _descend(codes[columns], here, own, steps[columns], largest).mul_(
                grid.scale[group]
            )
            slope.addmm_(hessian[:, columns], moved, alpha=-1)
            slope[columns].sub_(moved, alpha=damping)
    return codes, grid


def _descend(
    codes: Tensor, slope: Tensor, hessian: Tensor, steps: list[float], largest: int
) -> Tensor:
    """Set each code of a group in turn to the best one; [g, N], how far they moved.

    codes [g, N] are rewritten and slope [g, N], in units of a code, too; hessian [g, g] damped,
    `steps` one over its diagonal.
    """
    before = codes.clone()
    rows = zip(codes.unbind(), slope.unbind(), before.unbind(), strict=True)
    for j, (code, wanted, old) in enumerate(rows):
        code.add_(wanted, alpha=steps[j]).round_().clamp_(0, largest)
        slope[j + 1 :].addr_(hessian[j, j + 1 :], torch.sub(code, old, out=old), alpha=-1)
    return before


def _scale_step(centered: Tensor, scale: Tensor, hessian: Tensor, slope: Tensor) -> Tensor:
    """[N]: what to add to a group's scales, so that they stay exact in the checkpoint.

    centered [g, N] codes around zero, hessian [g, g] damped, slope [g, N].
    """
    curvature = (hessian @ centered).mul_(centered).sum(dim=0)
    gain = (centered * slope).sum(dim=0)
    wanted = torch.where(curvature > 0, gain / curvature, 0.0)
    step = round_scale(scale + wanted) - scale
    lower = step * (2 * gain - step * curvature) > 0
    same_sign = (scale + step) * scale > 0
    return torch.where(lower & same_sign, step, 0.0)


def _retarget_all(drifts: Sequence[Tensor], hessian: Tensor, damp_percent: float) -> str | None:
    """`_retarget` with a Hessian of the drifts' own; returns why that is not possible, if so."""
    try:
        order = torch.arange(len(hessian), device=hessian.device)
        factor = factorize(hessian, order, damp_percent)
    except SolverError as error:
        return str(error)
    for drift in drifts:
        _retarget(drift, factor)
    return None


def _retarget(drift: Tensor, factor: Factor) -> None:
    """E := E (H + damping)^-1 with inverse = U^T U, panel by panel. [N, K]"""
    for part in drift.split(rows_at_once(drift.shape[1], drift.device)):
        visited = part[:, factor.order]
        moved = torch.zeros_like(visited)
        for start in range(0, len(factor.order), BLOCK_SIZE):
            rows = factor.rows(start, start + BLOCK_SIZE)
            moved.addmm_(visited @ rows.t(), rows)
        part.index_copy_(1, factor.order, moved)


def _importance(hessian: Tensor, factor: Factor | None, scale_search: str) -> Tensor:
    """[K] fp32, what an error in each input feature counts in the search for grids.

    1 / inverse(H + damping)_kk is what an error in feature k costs once the best change of all
    others has made up for it. The Hessian's own diagonal, which ignores that others will, is all
    there is to round to nearest with.
    """
    diagonal = hessian.diagonal()
    if scale_search != "hessian" or not bool((diagonal > 0).any()):
        return torch.ones_like(diagonal)
    return diagonal if factor is None else factor.conditional_curvature()


def _grid_search(module: ModuleConfig, config: SolverConfig) -> GridSearch:
    exponent = config.scale_norm if config.scale_search == "norm" else 2.0
    search = GridSearch(
        bits=module.bits, sym=module.sym, signed=config.signed_scales, exponent=exponent
    )
    return search if config.scale_search != "none" else replace(search, num_candidates=1)


def _static_grids(target: Tensor, problem: _Problem) -> Grid:
    """Of the untouched weights, [K, N] -> [G, N]; the last group may be short."""
    groups = target.split(problem.group_size)
    importances = problem.importance.split(problem.group_size)
    found = [problem.grids.search(*group) for group in zip(groups, importances, strict=True)]
    return Grid(
        scale=torch.stack([grid.scale for grid in found]),
        zero=torch.stack([grid.zero for grid in found]),
        bits=problem.grids.bits,
    )


def _empty_grid(target: Tensor, problem: _Problem) -> Grid:
    shape = (problem.num_groups, target.shape[1])
    scale, zero = (torch.empty(shape, device=target.device) for _ in range(2))
    return Grid(scale=scale, zero=zero, bits=problem.grids.bits)


def _nearest(target: Tensor, grid: Grid, group_of: Tensor) -> Tensor:
    rows = [grid[group].quantize(row) for group, row in zip(group_of.tolist(), target, strict=True)]
    return torch.stack(rows)


def _dequantize(codes: Tensor, grid: Grid, group_of: Tensor) -> Tensor:
    """[K, N] fp32"""
    return (codes - grid.zero[group_of]).mul_(grid.scale[group_of])


def _visiting_order(importance: Tensor, act_order: str, group_size: int) -> Tensor:
    """[K] int64. "group" keeps the groups together, a short last one at its own rank too."""
    columns = torch.arange(len(importance), device=importance.device)
    if act_order == "none":
        return columns
    if act_order == "static":
        return torch.argsort(importance, descending=True, stable=True)
    groups = columns.split(group_size)
    ranked = sorted(groups, key=lambda group: -float(importance[group].max()))
    return torch.cat(
        [group[torch.argsort(importance[group], descending=True, stable=True)] for group in ranked]
    )


def _blocks(groups: list[int], *, whole_groups: bool) -> Iterator[tuple[int, int, slice | None]]:
    """Cut the visited columns into blocks: (start, end, the group's columns if one begins).

    `groups` names each column's group. With `whole_groups` no block reaches into the next group.
    """
    if not whole_groups:
        for start in range(0, len(groups), BLOCK_SIZE):
            yield start, min(start + BLOCK_SIZE, len(groups)), None
        return
    first = 0
    for _, members in groupby(groups):
        stop = first + sum(1 for _ in members)
        for start in range(first, stop, BLOCK_SIZE):
            opened = slice(first, stop) if start == first else None
            yield start, min(start + BLOCK_SIZE, stop), opened
        first = stop


def _squared_outputs(matrix: Tensor, hessian: Tensor) -> Tensor:
    """||m X||^2 of every row m, the sums over m H times m, [N] fp64. [N, K], [K, K]"""
    return ((matrix @ hessian) * matrix).sum(dim=1, dtype=torch.float64)


def _dampings(damp_percent: float) -> list[float]:
    dampings = [damp_percent]
    while dampings[-1] < MAX_DAMP_PERCENT:
        dampings.append(min(max(dampings[-1] * DAMP_STEP, 1e-4), MAX_DAMP_PERCENT))
    return dampings
