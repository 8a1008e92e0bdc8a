"""The messages that refuse a spec: the command line and, through CEL, the API server
use the same.
"""

from __future__ import annotations

from modelchain.families.registry import FAMILIES

ONE_MODEL = "give exactly one of model and modelConfig"
UNKNOWN_MODEL = "model '{name}' is not known; use one of {known}, or an inline modelConfig"
TEXT_HEADS = "width {w} is not divisible by heads {h}"

NEIGHBOURS = "stage '{after}' after '{before}': {mismatch}"
OTHER_FAMILY = f"a {' and a '.join(f.NAME for f in FAMILIES)} tower cannot be neighbours"
EQUAL = "{name} must be equal along the chain ({x} then {y})"
SHRINKS = "{name} shrinks ({x} then {y}); stages go from small to large"
NO_GROWTH = "no tower grows in width or depth; each stage must be larger than its predecessor"

ZERO_SHOT = "kind ZeroShot needs classNames and templates"
RETRIEVAL = "kind Retrieval takes no classNames or templates"
ONE_CLAIM = "give exactly one of claimTemplate and claimName"
NO_LIMIT = "give a limit: cost, gpuHours or both"
RANGE = "must lie between {low} and {high} (got {text})"

DOTS = "'..' is not allowed in a path"
PIPE = "'pipe:' runs a shell and is not allowed; give paths of files"
OUTSIDE = "{path} does not lie under spec.data.volume.mountPath {mount}"
NUL = "a path cannot hold a NUL character"
UNBALANCED = "unbalanced braces in '{pattern}'"
MANY_FILES = "the pattern names more than {limit} files"
DEEP_BRACES = "braces are nested more than {limit} deep"
TWICE = "the pattern names a file twice"

LARGE_BATCH = "{batch} is more than the {samples} samples of data.train"
MICRO_BATCH = "{micro} does not divide globalBatchSize {batch}"
RANKS = "stage '{stage}': {name} {batch} is not divisible by {ranks} processes"
WARM_UP = (
    "{warmup} steps of warm-up, but stage '{stage}' trains only {steps} steps ({epochs} epochs)"
)
NO_EPOCHS = "stage {stage} has no epochs: give them, or a target acceleration to allocate them by"

GATE_METRIC = "'{metric}' is not measured; name one of spec.evaluation"
NO_STAGE = "there is no stage '{name}'; only a stage after the first has a baseline"
FIRST_STAGE = (
    "'{name}' is the first stage, which is trained alone in any case; only a stage after the first"
    " has a baseline"
)
BASELINE_RANGE = f"'{{name}}' {RANGE}"
NO_BASELINE = "gates nothing: no stage is compared with anything; give a baseline, or train one"
BOTH_BASELINES = "a stage in both baseline and train: give its accuracy, or have it trained"
TWICE_TRAINED = "a stage is named twice"
RELAX_TARGET = (
    "onMiss: Relax lengthens what the plan allocates: give spec.allocation.targetAcceleration"
)
RELAX_EPOCHS = (
    "onMiss: Relax cannot lengthen the epochs that stage '{stage}' gives; leave them to the plan"
)
RELAX_BASELINE = "onMiss: Relax needs something to compare with: give a baseline, or train one"

# Only an API server checks these: `modelchain run` uses neither image nor storage.
CHAIN_NAME = "must be at most 24 of a-z, 0-9 and '-', a letter first and no '-' last (got '{name}')"
LOCAL = (
    "kind Local is for `modelchain run -f FILE --root DIR` on your machine; on a cluster leave"
    " out runner.kind"
)
IMAGE = (
    "must end in @sha256:<64 hex digits>, since a tag can move between two stages (got '{image}')"
)
STORAGE = (
    "cannot change once set, since the finished stages lie there; apply a chain of another name for"
    " another claim"
)
ARTIFACT = (
    "a StageArtifact never changes; `kubectl delete sart {name}` permits its stage to be trained"
    " again"
)
METRICS = "{name}: metrics are added to a StageArtifact's status; those that are there never change"


def one_line(text: str) -> str:
    """The text of another program as one line that is safe to print.

    A terminal would obey control characters, for example clear the screen, so they are escaped.
    """
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def shortened(text: str, length: int) -> str:
    """At most `length` characters. A longer text loses its middle, since the two ends of an error
    message say most.
    """
    if len(text) <= length:
        return text
    half = (length - 3) // 2
    return f"{text[: length - 3 - half]}...{text[len(text) - half :]}"
