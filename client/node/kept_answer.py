"""The answer to the last request to train, kept on the disk until the server has it.

A line may be dead when a site has trained for half an hour, and the site's process may be killed before the line is
back. The server then asks again, with the same message, and the site answers from this file: nothing is trained,
drawn or charged twice, and the same bytes leave as would have left before.

The file holds what was about to leave, and nothing else. Only the site's own user may read it. It is deleted when the
server has the answer, when its run has ended, and when the site is asked for another round.

Secure aggregation is left out: what is masked can only be opened with secrets that no file may hold.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tsugiki.common.errors import StorageError
from tsugiki.common.files import write_atomically
from tsugiki.common.wire.flower import inflate_object, objects_of

if TYPE_CHECKING:
    from flwr.app import RecordDict

log = logging.getLogger("tsugiki.client")

KINDS = ("train",)
"""The message types whose answers are kept."""


class KeptAnswer:
    """The answer in a file, if there is one.

    Args:
        path: the file; None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def keep(self, asked: str, answer: RecordDict) -> None:
        """Write an answer in place of the one before. A disk that is full costs the copy, and not the round.

        Args:
            asked: what is answered: a text that is another one for another request, or if the site has changed.
            answer: the content of the reply.
        """
        import numpy as np
        from safetensors.numpy import save

        if self._path is None:
            return
        contents = objects_of(answer)
        tensors = {name: np.frombuffer(content, np.uint8) for name, content in contents.items()}
        try:
            written = save(tensors, {"asked": asked, "answer": answer.object_id})
            write_atomically(self._path, written, mode=0o600)
        except StorageError as error:
            log.warning("the update is not kept on the disk: %s", error)

    def read(self, asked: str) -> RecordDict | None:
        """Return the answer to a request; None: the file has none that is whole.

        Args:
            asked: as for `keep`.
        """
        from flwr.app import RecordDict
        from safetensors import SafetensorError, safe_open

        if self._path is None or self._path.is_symlink() or not self._path.is_file():
            return None
        try:
            with safe_open(os.fspath(self._path), "numpy") as file:
                about = file.metadata() or {}
                if about.get("asked") != asked:
                    return None
                contents = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            log.warning("the kept update cannot be read: %s", type(error).__name__)
            return None
        if any(hashlib.sha256(content).hexdigest() != name for name, content in contents.items()):
            log.warning("the kept update is damaged")
            return None
        answer = inflate_object(about["answer"], contents)
        return answer if isinstance(answer, RecordDict) else None

    def forget(self) -> None:
        """Delete the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
