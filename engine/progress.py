"""What a run says while it runs: one live line on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

CLEAR_LINE = "\r\x1b[2K"


class Progress:
    """Progress of `steps` steps (or whatever `noun` says), counted from `first` (a resumed run does not start at 0).

    On a terminal the line is redrawn in place. Elsewhere a line is printed for the first report, the last, and at most
    every `interval` seconds between them, so that a log of a week stays readable.
    """

    def __init__(
        self,
        steps: int,
        first: int = 0,
        *,
        noun: str = "step",
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps, self.first, self.noun, self.interval, self.clock = steps, first, noun, interval, clock
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.started = clock()
        self._printed: float | None = None
        self._drawn = False

    def report(self, line: Mapping[str, Any]) -> None:
        """Show one line of metrics; `line["step"]` is the number of finished steps."""
        text = self._text(line)
        if self.live:
            self.stream.write(CLEAR_LINE + text[: shutil.get_terminal_size().columns - 1])
            self._drawn = True
        else:
            now, last = self.clock(), line["step"] >= self.steps
            if not last and self._printed is not None and now - self._printed < self.interval:
                return
            self._printed = now
            self.stream.write(text + "\n")
        self.stream.flush()

    def say(self, text: str) -> None:
        """A line that stays, above the live one."""
        self.stream.write((CLEAR_LINE if self._drawn else "") + text + "\n")
        self._drawn = False
        self.stream.flush()

    def close(self) -> None:
        """Leave the live line where it is and go to the next."""
        if self._drawn:
            self.stream.write("\n")
            self._drawn = False
            self.stream.flush()

    def _text(self, line: Mapping[str, Any]) -> str:
        step = line["step"]
        parts = [f"{self.noun} {step}/{self.steps}"]
        shown = (
            ("loss", "loss {:.4f}"),
            ("loss_video_audio", "video-audio {:.3f}"),
            ("loss_video_text", "video-text {:.3f}"),
            ("learning_rate", "lr {:.2e}"),
            ("samples_per_s", "{:.1f} clips/s"),
            ("tflops", "{:.3g} TFLOP/s"),
            ("mfu", "MFU {:.1%}"),
            ("data_wait", "data wait {:.0%}"),
        )
        for key, form in shown:
            if isinstance(line.get(key), (int, float)):
                parts.append(form.format(line[key]))
        if line.get("skipped_steps"):
            parts.append(f"{line['skipped_steps']} skipped")
        done = step - self.first
        if done > 0 and step < self.steps:
            parts.append("left " + duration((self.clock() - self.started) / done * (self.steps - step)))
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """1:05 (minutes), 2:03:04 (hours) or 3 d 04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
