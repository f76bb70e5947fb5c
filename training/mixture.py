"""How are the folders of a run mixed, and from which sample on otherwise? --data_weights, then --data_stages.

A run's position in its data is the number of samples it has consumed. --data_stages counts in steps, as people do; what a
step is in samples follows from the position of the checkpoint that a run goes on from, so that --batch_size may change.
"""

from batches.sampler import Mixture, share_bounds
from errors import UserError
from training.config import TrainConfig
from training.option_groups import parse_data_stages


def later_mixtures(config: TrainConfig, saved: dict) -> list[tuple[int, list[float]]]:
    """(first sample, weights) of each of --data_stages. saved: the state of the checkpoint that the run goes on from, or {}.

    Raises UserError where a mixture that has begun is not as it was.
    """
    step, samples = saved.get("step", 0), saved.get("samples_consumed", 0)
    known = parse_data_stages(saved.get("options", {}).get("data_stages", []))
    padded = [(first, _with_zeros(weights, len(config.data_dir))) for first, weights in known]
    begun = [stage for stage in padded if stage[0] < step]
    given = config.data_stages_by_step
    if [stage for stage in given if stage[0] < step] != begun:
        told = " ".join(f"{first}:{','.join(f'{weight:g}' for weight in weights)}" for first, weights in begun)
        raise UserError(
            f"--data_stages {' '.join(config.data_stages)}: before step {step}, where this run goes on, it was "
            f"{told or 'none'}; give that as it was, and what is to come after it"
        )
    starts = [samples + (first - step) * config.batch_size for first, _ in given]
    # where a run has passed over samples, what was worked out at its start is not what follows from here
    same_batch = saved.get("options", {}).get("batch_size") == config.batch_size
    for number, (first, _) in enumerate(saved.get("data_order", {}).get("data_stages", [])):
        if number < len(begun) or (same_batch and given[number : number + 1] == padded[number : number + 1]):
            starts[number] = first
    return [(start, weights) for start, (_, weights) in zip(starts, given, strict=True)]


def check_mixture(saved: dict, now: dict, samples: int) -> dict:
    """`saved`, the data order of a checkpoint, as it reads with the folders that join a run `now` and were not drawn from yet.

    The result differs from `now` where the samples before `samples` do. A folder joins with the weight 0 in --data_weights
    and in the stages that have begun.
    """
    if "weights" not in saved or "weights" not in now:
        return saved
    joined = len(now["fingerprints"]) - len(saved["fingerprints"])
    ahead = [stage for stage in now["data_stages"] if stage[0] >= samples]
    begun = [
        [first, _with_zeros(weights, len(now["weights"]))]
        for first, weights in saved.get("data_stages", [])
        if first < samples
    ]
    weights = _with_zeros(saved["weights"], len(now["weights"]))
    same = len(weights) == len(now["weights"]) and share_bounds(weights) == share_bounds(now["weights"])
    seen = {"weights": now["weights"] if same else weights, "data_stages": begun + ahead}
    if joined > 0:
        seen["fingerprints"] = saved["fingerprints"] + now["fingerprints"][-joined:]
    return saved | seen


def describe_mixtures(config: TrainConfig, later: Mixture) -> list[str]:
    """One sentence for the start of a run where the mixture changes in it."""
    told = [
        f"from step {step:,} on " + ", ".join(f"{100 * w / sum(weights):.3g} % {folder}" for folder, w in _drawn(config, weights))
        for step, weights in config.data_stages_by_step
    ]  # fmt: skip
    return [f"mixture: {'; '.join(told)}"] if later else []


def _drawn(config: TrainConfig, weights: list[float]) -> list[tuple[str, float]]:
    return [(folder, weight) for folder, weight in zip(config.data_dir, weights, strict=True) if weight]


def _with_zeros(weights: list[float], count: int) -> list[float]:
    return [*weights, *[0.0] * (count - len(weights))]
