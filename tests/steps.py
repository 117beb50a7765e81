"""For tests, and for the programs that they start: to do something in the middle of a training step."""

from support.run import Run


def in_each_step(action, replace=setattr) -> None:
    """Call action(run) in each optimizer step from now on, before the loop gets the step's last micro-batch.

    replace   setattr, or that of pytest's monkeypatch, which takes it back
    """
    micro_batches = Run.micro_batches

    def watched(run, epoch):
        for step, batch, last in micro_batches(run, epoch):
            if last:
                action(run)
            yield step, batch, last

    replace(Run, "micro_batches", watched)
