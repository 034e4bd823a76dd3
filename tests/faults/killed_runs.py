"""Runs commands again and again, each ended at a random moment, and finishes them with `--resume`.

A process of its own, since it forks: `python -m tests.faults.killed_runs FOLDER < CASES` prints as JSON what became of
every case. A case is `{"name", "command", "arguments", "kills", "of", "resume"}`: of `kills` moments, each is one of
the calls that `of` lists (see `Moment`); `{at}` in the arguments stands for the folder of a run.
"""

import json
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from tests.faults.forks import Moment, calls_of, child, digests, preload, prepare, was_sent

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
KILLS_OF_ONE_RUN = 3
RESUMABLE = 3


class Case:
    """A command that is ended again and again.

    Args:
        folder: where its runs go.
        given: the case, as JSON holds it.
    """

    def __init__(self, folder: Path, given: dict[str, Any]) -> None:
        self.folder, self.messages = folder / given["name"], folder / "messages"
        self.name, self.command, self._arguments = given["name"], given["command"], given["arguments"]
        self.of = given["of"]
        self.again = ["--resume"] if given["resume"] else []
        self.draw = random.Random(self.name)
        self.kills, self.late, self.wrong = 0, 0, list[str]()

    def arguments(self, at: Path) -> list[str]:
        """The command line of a run."""
        return [word.replace("{at}", str(at)) for word in self._arguments]

    def harried(self, kills: int) -> dict[str, Any]:
        """Ends runs at random moments until there are enough of them.

        Returns:
            `kills`, how many were ended; `late`, how many of the signals came too late to keep a run from its end;
            `wrong`, what was not as it has to be; `calls`, of a whole run.
        """
        preload(self.command, self.arguments(self.folder / "whole"), self.messages)
        self.calls = calls_of(self.command, self.arguments(self.folder / "counted"), self.messages, self.of)
        self.wanted = digests(self.folder / "whole")
        run = 0
        while self.kills < kills and len(self.wrong) < 5:
            run += 1
            self._one_run(self.folder / f"run{run}", min(KILLS_OF_ONE_RUN, kills - self.kills))
        return {"kills": self.kills, "late": self.late, "wrong": self.wrong, "calls": self.calls}

    def _one_run(self, at: Path, kills: int) -> None:
        for attempt in range(kills + 1):
            moment = None if attempt == kills else self._moment()
            arguments = [*self.arguments(at), *(self.again if attempt else [])]
            status = child(self.command, arguments, moment=moment, messages=self.messages)
            finished = self._judge(at, status, f"{at.name}, attempt {attempt}, {moment}", was_sent())
            if finished or moment is None:
                break
        if not finished:
            self.wrong.append(f"{at.name}: exit status {status} in the end")
        # A kill in the midst of the last clearing away leaves files that the next run into the folder takes away.
        found = {name: digest for name, digest in digests(at).items() if not name.startswith("run.partial/")}
        if found != self.wanted:
            self.wrong.append(f"{at.name}: {sorted(set(found.items()) ^ set(self.wanted.items()))} differ")
        shutil.rmtree(at)

    def _moment(self) -> Moment:
        of = self.draw.choice(self.of)
        return Moment(self.draw.randrange(1, self.calls[of]), of, self.draw.choice(SIGNALS))

    def _judge(self, at: Path, status: int, where: str, sent: bool) -> bool:
        """Takes note of what is wrong about a fork that has ended; whether its run is whole."""
        said = self.messages.read_text(encoding="utf-8").splitlines()
        finished = (at / "run" / "run.yaml").exists()
        self.kills += sent and status != 0
        self.late += sent and status == 0
        if status not in ((0, -signal.SIGKILL, RESUMABLE) if sent else (0,)):
            self.wrong.append(f"{where}: exit status {status}: {said[-20:]}")
        if status == RESUMABLE and not (said and said[-1].startswith(f"fillm {self.command}: ")):
            self.wrong.append(f"{where}: no clear line: {said[-20:]}")
        if any(line.startswith("Traceback") for line in said):
            self.wrong.append(f"{where}: a traceback: {said[-20:]}")
        if not finished and (status == 0 or (at / "run").exists()):
            self.wrong.append(f"{where}: half a folder, or none")
        return finished


if __name__ == "__main__":
    prepare()
    cases = json.load(sys.stdin)
    print(json.dumps({case["name"]: Case(Path(sys.argv[1]), case).harried(case["kills"]) for case in cases}))
