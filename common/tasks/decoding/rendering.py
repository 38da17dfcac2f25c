"""Render a chat template in a process of its own, with limits: a template is a program, and may run for ever.

The templates' language has loops and products of texts, so that no bound inside this process would hold. The text is
taken from that process, and nothing is rendered here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST_CHARACTERS = 1_000_000
"""Far more than the text that any template puts around a message."""
CPU_S = 10
"""Seconds of computing for the template; others take milliseconds."""
TIMEOUT_S = 120.0
"""Seconds for everything: for a system without the other limits, and for a machine with much else to do."""
MEMORY_BYTES = 4 * 2**30
"""Memory of the process, most of it taken by libraries."""

_CHILD = """
import json, sys, time
from importlib import import_module
from transformers.utils.chat_template_utils import render_jinja_template
job = json.load(sys.stdin)
try:
    resource = import_module("resource")
except ImportError:
    pass
else:
    for name, most in (("RLIMIT_CPU", int(time.process_time()) + job["cpu_s"]), ("RLIMIT_AS", job["memory_bytes"])):
        resource.setrlimit(getattr(resource, name), (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
(text,), _ = render_jinja_template([job["messages"]], chat_template=job["template"], **job["values"])
if len(text) > job["longest"]:
    sys.exit("too long")
json.dump(text, sys.stdout)
"""
"""What the process runs. The limits are for the template alone: the libraries are loaded before them."""


class TemplateFailed(Exception):
    """The template gave no text. The argument says why, in words that contain nothing of the template."""


def render(template: str, messages: Sequence[Mapping[str, str]], values: Mapping[str, Any]) -> str:
    """Return the text that a template makes of a chat, as `apply_chat_template` would.

    Args:
        template: of a tokenizer.
        messages: each with role and content.
        values: what the template may use beside them, such as the special tokens.

    Raises:
        TemplateFailed: it raises an error, or reaches a limit.
    """
    job = {
        "template": template,
        "messages": list(messages),
        "values": dict(values),
        "longest": LONGEST_CHARACTERS,
        "cpu_s": CPU_S,
        "memory_bytes": MEMORY_BYTES,
    }
    # One thread each: the memory that idle threads reserve would count.
    quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD],
            input=json.dumps(job).encode(),
            capture_output=True,
            env={**os.environ, **quiet},
            timeout=TIMEOUT_S,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise TemplateFailed("it takes too long") from error
    except subprocess.CalledProcessError as error:
        raise TemplateFailed("it fails, takes too long or needs too much memory") from error
    return str(json.loads(done.stdout))
