"""Plain torch replacements for kernels that vLLM's CPU build lacks; the models are vLLM's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def install() -> None:
    """Fill the gaps of this vLLM's CPU build, and replace nothing that works."""
    from vllm import _custom_ops

    try:
        from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    except ImportError:
        return  # a vLLM before these models run at all
    if hasattr(CPURouter, "stand_in") or hasattr(torch.ops._C, "selective_scan_fwd"):
        return
    multiply, step = _custom_ops.onednn_mm, _custom_ops.selective_state_update_cpu
    route = CPURouter._compute_routing

    def transposed_too(handler: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        return multiply(handler, x.contiguous(), bias)

    def mamba_too(state: Tensor, *rest: Any) -> None:
        (step if state.dim() == 4 else selective_step)(state, *rest)

    def sigmoid_too(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.scoring_func == "sigmoid" and not self.use_grouped_topk:
            # It knows the sigmoid in groups only, and one group of all experts is no restriction.
            self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1
        return route(self, *args, **kwargs)

    _custom_ops.selective_scan_fwd = selective_scan
    _custom_ops.selective_state_update_cpu = mamba_too
    _custom_ops.onednn_mm = transposed_too
    CPURouter._compute_routing = sigmoid_too
    CPURouter.stand_in = True


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor,  # noqa: N803
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    query_start_loc: Tensor,
    cache_indices: Tensor,
    has_initial_state: Tensor | None,
    ssm_states: Tensor,
    null_block_id: int,
    *_: Any,
) -> None:
    """Mamba over whole sequences side by side, without prefix caching, in place."""
    out = delta if z is None else z
    bounds = query_start_loc.tolist()
    for number, slot in enumerate(cache_indices.tolist()):
        if slot == null_block_id:
            continue
        if has_initial_state is None or not has_initial_state[number]:
            ssm_states[slot] = 0
        for t in range(bounds[number], bounds[number + 1]):
            out[:, t] = _advance(
                ssm_states[slot],
                u[:, t],
                _time(delta[:, t], delta_bias, delta_softplus),
                (A, B[0, :, t], C[0, :, t], D),
                None if z is None else z[:, t],
            )


def selective_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor,  # noqa: N803
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    indices: Tensor,
    _to: Tensor | None,
    null_block_id: int,
    out: Tensor,
    *_: Any,
) -> None:
    """One step of Mamba for each of several sequences, in place."""
    for number, slot in enumerate(indices.flatten().tolist()):
        if slot != null_block_id:
            out[number] = _advance(
                state[slot],
                x[number],
                _time(dt[number], dt_bias, dt_softplus),
                (A, B[number], C[number], D),
                None if z is None else z[number],
            )


def _time(dt: Tensor, bias: Tensor | None, positive: bool) -> Tensor:
    dt = dt.float() if bias is None else dt.float() + bias.float()
    return softplus(dt) if positive else dt


def _advance(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    matrices: tuple[Tensor, Tensor, Tensor, Tensor],
    z: Tensor | None,
) -> Tensor:
    a, b, c, d = (matrix.float() for matrix in matrices)
    new = torch.exp(dt[:, None] * a) * state.float() + (dt * x.float())[:, None] * b
    state.copy_(new)
    y = (new * c).sum(-1) + d * x.float()
    return y if z is None else y * silu(z.float())
