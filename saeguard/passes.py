"""One pass edited outside of any block, where a framework runs the code: a hook function, a line of a trace.

Nobody looks after such code: what calls it has to say that a pass begins and which tokens it has, and to hand over
every site's stream once, in the order in which the model comes to them. Whatever does not fit raises.
"""

from collections.abc import Mapping

import torch

from saeguard.axes import Stream
from saeguard.engines.base import Pass, Place
from saeguard.engines.calls import Call, Forward, View, needed_later, stream_at, tokens_of
from saeguard.errors import GuardNotApplied, UnstableEdit
from saeguard.sites import Site
from saeguard.steering import Run


class OnePass:
    """The edits of a run in one pass, from the first site to the last."""

    def __init__(self, run: Run, places: Mapping[Site, Place], seen: Pass):
        call = Call(None)
        record = call.records[run] = run.open_record(None)
        self._view = View(tokens_of(seen, run, None), run.cover(seen.rows, None).to(seen.device), record)
        self._forward = Forward(call, {run: self._view}, seen.rows, seen.width, frozenset(places))
        self._run, self._places = run, places
        self._needed = needed_later([run], places)

    def change(self, site: Site, carried: Stream) -> Stream:
        """What a module has to carry at ``site`` instead of ``carried``. Raises `GuardNotApplied`, `UnstableEdit`."""
        forward, view, place = self._forward, self._view, self._places[site]
        if site in forward.ran or carried.shape[:2] != (forward.rows, forward.width):
            raise GuardNotApplied(
                f"an edit at {site}, outside of a steer block",
                "the pass came to it twice" if site in forward.ran else
                f"the stream is {tuple(carried.shape[:2])}, and the tokens are {(forward.rows, forward.width)}",
                "Let each pass of the whole model be edited once, or use steer(model, plan).",
            )  # fmt: skip
        forward.ran.add(site)
        base = None if place.base is None else stream_at(forward, place.base, site)
        x = place.value(carried, base)
        editor = self._run.editors.get(site)
        if editor is None:
            self._keep(site, x)
            return carried
        streams = {other: stream_at(forward, other, site) for other in editor.reads}
        edit = editor(x, view.tokens, view.covers, streams, view.record.memory)
        view.record.memory.check(view.tokens)
        after = torch.where(edit.changed[..., None], place.add(carried, edit.dx), carried)
        if bool((edit.changed & ~torch.isfinite(after).all(-1)).any()):
            raise UnstableEdit(
                f"an edit at {site}",
                "an edited vector holds NaN or infinity",
                "Use smaller amounts, or a dtype with more range.",
            )
        x_after = place.value(after, base)
        self._keep(site, x_after)
        self._run.see(site, x, x_after, view, edit)
        return after

    def _keep(self, site: Site, x: Stream) -> None:
        if site in self._needed:
            self._forward.streams[site] = x.clone()
