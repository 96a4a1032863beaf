"""A terminal for tests: what programs write to a pseudo-terminal, and what it shows."""

import fcntl
import os
import pty
import struct
import termios
import threading


class Terminal:
    """A pseudo-terminal of a given width; `file` is its end for programs."""

    def __init__(self, columns=120):
        """Reads in the background what comes."""
        self._reading, writing = pty.openpty()
        fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.file, self._content = open(writing, "w", encoding="utf-8"), b""  # noqa: SIM115
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        try:
            while content := os.read(self._reading, 1 << 16):
                self._content += content
        except OSError:  # the other end is closed
            return

    def written(self):
        """Everything that was written; closes the end for programs."""
        self.file.close()
        self._reader.join(30)
        os.close(self._reading)
        return self._content.decode()


def shown(text):
    """The lines that a terminal shows after a text with carriage returns; the last is the one with
    the cursor.
    """
    lines = []
    for line in text.split("\n"):
        cells = ""
        for part in line.split("\r"):
            cells = part + cells[len(part) :]
        lines.append(cells.rstrip())
    return lines
