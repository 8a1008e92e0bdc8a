"""Class names and prompt templates of a zero-shot evaluation: open_clip's own, or JSON lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from modelchain.api.contracts import TaskEvaluation
from modelchain.api.spec import BUILT_IN_CLASS_NAMES, BUILT_IN_TEMPLATES
from modelchain.errors import InputError


def class_names(evaluation: TaskEvaluation) -> list[str]:
    if evaluation.class_names == BUILT_IN_CLASS_NAMES:
        from open_clip import IMAGENET_CLASSNAMES  # here, since it takes four seconds

        return list(IMAGENET_CLASSNAMES)
    return _json_list(str(evaluation.class_names), "classNames")


def prompt_templates(evaluation: TaskEvaluation) -> list[Callable[[str], str]]:
    """Functions from a class name to a prompt. Only `{}` is replaced; other braces stay."""
    if evaluation.templates == BUILT_IN_TEMPLATES:
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return list(OPENAI_IMAGENET_TEMPLATES)
    texts = _json_list(str(evaluation.templates), "templates", inner="val_template")
    for text in texts:
        if "{}" not in text:
            raise InputError(
                f"template {text!r} has no {{}} for the class", file=evaluation.templates
            )
    return [lambda name, text=text: text.replace("{}", name) for text in texts]  # type: ignore[misc]


def _json_list(path: str, field: str, inner: str | None = None) -> list[str]:
    """A JSON list of texts. With `inner`, an object with such a list under that key is accepted,
    too, as some data sets have it.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path, field=field) from error
    except ValueError as error:
        raise InputError(f"is not JSON: {error}", file=path, field=field) from error
    if isinstance(value, dict) and inner in value:
        value = [value[inner]] if isinstance(value[inner], str) else value[inner]
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(v, str) and v.strip() for v in value)
    ):
        raise InputError(f"must be a JSON list of texts, for {field}", file=path)
    return value
