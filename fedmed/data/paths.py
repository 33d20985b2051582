"""Paths of a manifest never lead out of their site folder."""

from __future__ import annotations

import posixpath
import stat
from pathlib import Path, PureWindowsPath


class FolderGuard:
    """Says whether a relative path stays inside a folder, symbolic links followed.

    Folders are resolved once and remembered, which keeps thousands of rows cheap.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._resolved = root.resolve()
        self._folders: dict[str, bool] = {}

    def inside(self, text: str) -> tuple[str, str]:
        """The path in its shortest form, and what is wrong with it (empty if nothing).

        A file that does not exist is not wrong here: only where it would lie matters.
        """
        if text.startswith("/") or PureWindowsPath(text).drive:
            return text, "is an absolute path"
        path = posixpath.normpath(text)
        if ".." in text.split("/"):
            return path, "leads out of the site folder" if path.startswith("..") else "holds '..'"
        folder = posixpath.dirname(path)
        if folder not in self._folders:
            self._folders[folder] = self._is_inside(self._root / folder)
        if not self._folders[folder] or not self._leaf_is_inside(self._root / path):
            return path, "leads out of the site folder"
        return path, ""

    def _leaf_is_inside(self, path: Path) -> bool:
        try:
            mode = path.lstat().st_mode
        except OSError:
            return True
        return not stat.S_ISLNK(mode) or self._is_inside(path)

    def _is_inside(self, path: Path) -> bool:
        try:
            return path.resolve().is_relative_to(self._resolved)
        except (OSError, RuntimeError):  # a loop of links
            return False
