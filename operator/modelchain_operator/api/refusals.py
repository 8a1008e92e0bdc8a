"""What is a refusal of the API server, and which command to type then.

The server gives the cause only in the sentence of its answer, so that is searched.
"""

from __future__ import annotations

import re

from modelchain_operator.api.kube import ApiError, Forbidden, Invalid

# Each has a space or a capital letter, so that it is never a part of a name in the sentence.
_WEBHOOK = re.compile("failed calling webhook|admission webhook")
_LIMIT = re.compile(r"\b(maximum|minimum) [^ ]+ usage per ")


def is_refusal(error: ApiError) -> bool:
    """Whether the server will not take a request as long as nothing changes.

    A webhook that cannot be reached is a refusal, too, although the server answers that it failed.
    Other failures pass by themselves. In a namespace that is being deleted, nothing is to be told.
    """
    if isinstance(error, Forbidden) and error.namespace_terminating:
        return False
    return isinstance(error, Forbidden | Invalid) or bool(_WEBHOOK.search(str(error)))


def next_command(message: str, namespace: str) -> str:
    """The command that shows the quota, policy or limit; empty if the message names none."""
    if "exceeded quota" in message:
        return f"kubectl describe resourcequota -n {namespace}"
    if "PodSecurity" in message:
        return f"kubectl get namespace {namespace} --show-labels"
    if "failed calling webhook" in message:
        return "kubectl get mutatingwebhookconfigurations,validatingwebhookconfigurations"
    if _LIMIT.search(message):
        return f"kubectl describe limitrange -n {namespace}"
    return ""
