"""The plan of a run: the steps of all its epochs, and how each is cut into packs."""

from orpo_ray.config import RunConfig, warmup_steps
from orpo_ray.data.store import PairTable
from orpo_ray.errors import ConfigError
from orpo_ray.objectives import build_objective
from orpo_ray.training.plan import Indices, Layout, Step, cut_step, pack_costs, step_pairs


def steps_of_run(config: RunConfig, count: int) -> list[Indices]:
    """The pairs of each optimizer step of a run over `count` pairs, epoch after epoch."""
    settings = config.training
    steps_per_epoch = -(-count // settings.pairs_per_step)
    wanted = settings.max_steps or max(1, round((settings.epochs or 1) * steps_per_epoch))
    epochs = range(-(-wanted // steps_per_epoch))
    steps = [
        pairs
        for epoch in epochs
        for pairs in step_pairs(count, settings.pairs_per_step, settings.seed, epoch)
    ][:wanted]
    warmup = warmup_steps(settings.warmup, len(steps))
    if warmup >= len(steps):
        raise ConfigError(
            f"training.warmup: {warmup} steps, but the run has {len(steps)}; lower it, or train "
            "more steps"
        )
    return steps


def plan_run(
    config: RunConfig, table: PairTable, world_size: int, token_budget: int, layout: Layout
) -> list[Step]:
    """The steps of the whole run, with the packs of each rank."""
    with_rejected = build_objective(config.objective).needs_rejected
    costs = pack_costs(table.lengths, layout, with_rejected=with_rejected)
    return [
        cut_step(pairs, costs, world_size, token_budget)
        for pairs in steps_of_run(config, len(table))
    ]
