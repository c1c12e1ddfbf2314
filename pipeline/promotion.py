"""When a challenger becomes the champion."""

from dataclasses import dataclass

from pipeline import registry, tracking
from pipeline.errors import UserError


@dataclass(frozen=True)
class PromotionResult:
    """What was decided.

    Attributes:
        promoted: whether the challenger is the champion now.
        reason: why, or why not.
        champion: the version that is the champion now.
        challenger: the version that was considered.
    """

    promoted: bool
    reason: str
    champion: str
    challenger: str


def promote(name: str) -> PromotionResult:
    """Makes the challenger of a registered model its champion if its validation bound is higher, or if there is none.

    Args:
        name: of the registered model.

    Raises:
        UserError: there is no such model or challenger, or the two were validated on different data.
    """
    tracking.check_reachable()
    challenger = registry.find_alias(name, registry.CHALLENGER)
    champion = registry.find_alias(name, registry.CHAMPION)
    if challenger is None:
        raise UserError(f"{name} has no version with the alias {registry.CHALLENGER!r}; jobs.train sets it")
    if champion is None:
        return _promote(challenger, "there was no champion")
    if champion.version == challenger.version:
        return PromotionResult(False, "the challenger is the champion already", champion.uri, challenger.uri)
    for model in (champion, challenger):
        if missing := {"dataset_fingerprint", "valid/lower_bound", "variance_floor"} - set(model.tags):
            raise UserError(
                f"{model.uri} has no tag {sorted(missing)[0]!r}, which jobs.train sets; set the alias "
                f"{registry.CHAMPION!r} by hand"
            )
    if champion.tags["dataset_fingerprint"] != challenger.tags["dataset_fingerprint"]:
        raise UserError(
            f"{champion.uri} and {challenger.uri} were validated on different data, so that their bounds cannot be "
            f"compared; evaluate both, and set the alias {registry.CHAMPION!r} by hand"
        )
    ours, theirs = (_described(model) for model in (challenger, champion))
    if float(challenger.tags["valid/lower_bound"]) > float(champion.tags["valid/lower_bound"]):
        return _promote(challenger, f"its validation bound, {ours}, is higher than the champion's, {theirs}")
    reason = f"its validation bound, {ours}, is not higher than the champion's, {theirs}"
    return PromotionResult(False, reason, champion.uri, challenger.uri)


def _promote(challenger: registry.RegisteredModel, reason: str) -> PromotionResult:
    registry.set_alias(challenger, registry.CHAMPION)
    return PromotionResult(True, reason, challenger.uri, challenger.uri)


def _described(model: registry.RegisteredModel) -> str:
    return (
        f"{float(model.tags['valid/lower_bound']):.2f} nats at variance floor {float(model.tags['variance_floor']):g}"
    )
