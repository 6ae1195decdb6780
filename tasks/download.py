"""Downloads that resume where they stopped."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import requests
from tqdm.auto import tqdm

from metamom.common.reading import what_is_there
from metamom.tasks.locate import DataError

CHUNK = 1 << 14  # bytes; an incomplete chunk is lost if the connection breaks
TIMEOUT = (15, 60)  # seconds to connect, and between two pieces of a response


class ResumingDownloader:
    """A downloader for `pooch.retrieve` that fetches into ``part`` and resumes with an HTTP Range request.

    ``part`` outlives the process, so another process can resume too. Once complete, it becomes pooch's temporary file.
    Pooch then checks the digest, and removes the file if it is wrong.

    Pooch's own downloader starts over when a connection breaks, and so does requests beneath it.

    Args:
        part: the partial file, in the folder of the target.
        limit: most bytes to accept.
        attempts: how many attempts in a row may receive nothing new.
        pause: seconds to wait between attempts.
    """

    def __init__(self, part: Path, *, limit: int, attempts: int = 4, pause: float = 1.0) -> None:
        self.part, self.limit, self.attempts, self.pause = part, limit, attempts, pause

    def __call__(self, url: str, output_file: str | os.PathLike[str], pooch: object) -> None:
        """Fetch ``url`` to ``output_file``.

        Raises:
            DataError: if the server can't be reached, refuses, or keeps disconnecting; ``part`` keeps the received
                bytes. Also if ``part`` is not a regular file: nothing is written through a link.
        """
        kind = "a link" if self.part.is_symlink() else what_is_there(self.part)
        if kind not in ("a file", "nothing"):
            raise DataError(f"{self.part} is {kind}, where the partial download should go. Remove it and try again.")
        failures, most = 0, self._size()
        while True:
            try:
                self._fetch_rest(url)
                break
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                failures = 1 if self._size() > most else failures + 1
                most = max(most, self._size())
                if failures >= self.attempts:
                    raise DataError(
                        f"the download of {url} broke off after {self._size()} bytes ({error}). The partial file is "
                        f"kept in {self.part}: run the same command again to continue, or put the file in place by "
                        "hand."
                    ) from error
                time.sleep(self.pause)
            except requests.RequestException as error:
                raise DataError(
                    f"can't download {url} ({error}). Try again later, or put the file in place by hand."
                ) from error
        os.replace(self.part, output_file)

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _fetch_rest(self, url: str) -> None:
        have = self._size()
        # A compressed transfer could not be resumed at a byte of the file.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            if answer.status_code == requests.codes.requested_range_not_satisfiable:
                if answer.headers.get("Content-Range") == f"bytes */{have}":
                    return  # it was complete already
                self.part.unlink()
                raise requests.ConnectionError("the partial file doesn't fit the server's; starting over")
            answer.raise_for_status()
            resumes = answer.status_code == requests.codes.partial_content and _start(answer) == have
            if not resumes:
                have = 0  # the server sends the whole file
            length = answer.headers.get("Content-Length")
            total = None if length is None else have + int(length)
            self._append(answer, url, have, total)
        if total is not None and self._size() != total:
            raise requests.ConnectionError(f"got {self._size()} of {total} bytes")

    def _append(self, answer: requests.Response, url: str, have: int, total: int | None) -> None:
        bar = tqdm(
            total=total, initial=have, desc=url.rsplit("/", 1)[-1], unit="B", unit_scale=True, disable=None, leave=False
        )
        with bar, self.part.open("ab" if have else "wb") as file:
            for chunk in answer.iter_content(CHUNK):
                have += len(chunk)
                if have > self.limit:
                    self.part.unlink()
                    raise DataError(f"{url} sends more than {self.limit} bytes, so it is not the published file.")
                file.write(chunk)
                bar.update(len(chunk))


def _start(answer: requests.Response) -> int | None:
    match = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(match[1]) if match else None
