"""Runs sources that are read once: live ones, whose newest frames are shown, recorded and logged,
and others in one go into files, which cannot be resumed.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console
from rich.live import Live as LiveTable
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from engines.backends.registry import label_of
from engines.choose import open_localizer
from engines.files import checked_suffix, write_json
from engines.localizer import Localizer
from engines.maps import method_of
from engines.options import EngineOptions
from engines.text import displayable, in_words, shown
from realtime.annotate import Look
from realtime.batch.job import Naming, with_ending
from realtime.capture import Connection, Feed, every_frame
from realtime.documents import course_of, open_in_browser, plot_latency
from realtime.event_clips import EventClips
from realtime.event_sinks import EventSink, Notifier, Timeline, receiver_of
from realtime.events import rules_for
from realtime.file_sinks import (
    JsonlSink,
    Recorder,
    Recording,
    TraceSink,
    VideoSink,
    check_log,
    make_writable,
)
from realtime.frame_queue import Policy
from realtime.latency_budget import open_within
from realtime.options import StreamOptions
from realtime.pipeline import Live, run_frames
from realtime.session import Session
from realtime.sinks import Beside, Notices, Sink, WindowSink, has_display
from realtime.sources.spec import first_size_px, kind_of, open_source
from realtime.sources.video import Source, SourceOptions
from realtime.statistics import LiveRun, Run
from realtime.teaching.learning import Command, Learning, ReplaceableLocalizer
from realtime.teaching.teacher import Teacher, check_folder
from realtime.teaching.why import Explaining
from realtime.terminal import live_table
from realtime.tracking.options import WHOLE_FRAMES, Following, FollowOptions, opened, shown_from
from realtime.web.server import Address, MetricsSink, PageServer, qr_code

TABLE_EVERY_S = 0.5


def stream_chosen(
    specs: Sequence[str],
    options: StreamOptions,
    following: FollowOptions,
    choice: EngineOptions,
    budget_ms: float | None,
    console: Console,
    fit_command: Command | None = None,
) -> dict[str, Any]:
    """Open the engine that is chosen, and run ``stream`` with it.

    Args:
        specs: see ``stream``.
        options: see ``stream``.
        following: see ``stream``.
        choice: the engine.
        budget_ms: of a frame; None for none.
        console: see ``stream``.
        fit_command: what fits heads to labels that are made on the page; None where none can be.

    Raises:
        SightlineError: the options contradict each other, the engine cannot be opened, or see
            ``stream``.
    """
    if options.open_page and options.web is None:
        options = replace(options, web=str(Address().port))
    following, choice = following.for_source(_alone(specs)).beside(choice)
    batch, size_px = min(options.batch, len(specs)), first_size_px(specs)
    localizer = open_within(choice, budget_ms, console, batch=batch, first_px=size_px)
    if options.web is None:
        return stream(specs, localizer, console, options, following)
    why_not = ""
    if budget_ms is not None or fit_command is None:
        why_not = "it keeps a latency budget, which swaps engines by itself: start it without one"
    elif not method_of(choice.method).fitted:
        why_not = f"the method {choice.method} reads no fitted head: start it without a method"
    check_folder(options.labels_dir)
    if not why_not:
        localizer = ReplaceableLocalizer(localizer)

    def with_head(path: Path) -> EngineOptions:
        return replace(choice, head=str(path), layer=None, wanted_class=None)

    def teacher(session: Session) -> Teacher:
        if why_not or not isinstance(localizer, ReplaceableLocalizer):
            explain = Explaining(lambda: (choice, 0))
            return Teacher(options.labels_dir, None, why_not, options.repeat, explain)

        def open_head(path: Path) -> Localizer:
            first = session.connections[0]
            first_px = (first.width_px, first.height_px) if first.width_px else None
            return open_localizer(with_head(path), batch=batch, first_px=first_px)

        def in_use() -> tuple[EngineOptions, int]:
            path, swaps = learning.in_use
            return with_head(path) if path else choice, swaps

        assert fit_command is not None
        learning = Learning(localizer, fit_command, open_head, session.swapped, options.labels_dir)
        explain = Explaining(in_use)
        return Teacher(options.labels_dir, learning, "", options.repeat, explain)

    return stream(specs, localizer, console, options, following, teacher)


def _alone(specs: Sequence[str]) -> bool:
    """Whether no source is a film."""
    return all(kind_of(spec).alone for spec in specs)


def stream(
    specs: Sequence[str],
    localizer: Localizer,
    console: Console,
    options: StreamOptions = StreamOptions(),
    following: FollowOptions = WHOLE_FRAMES,
    teacher_of: Callable[[Session], Teacher] | None = None,
) -> dict[str, Any]:
    """Run until all sources have ended, ``options.seconds`` have passed, the window is quit, or
    Ctrl-C.

    Args:
        specs: see ``realtime.sources.spec.open_source``.
        localizer: the engine, or the engines that a budget is held with; its batch is how many
            cameras share a call.
        console: shows a rolling table, and a line when a source is lost or back.
        options: all else.
        following: whether and what to follow.
        teacher_of: makes what the page teaches with; None for a page that does not.

    Returns:
        The summary of the run, with ``captured`` (frames by source), ``connections`` and
        ``interrupted``.

    Raises:
        SightlineError: the sources or a result fail; what was recorded until then is kept.
    """
    following = following.for_source(_alone(specs))
    _check_outputs(options)
    notify = partial(console.print, style="yellow", markup=False, highlight=False)
    lost = Notices(notify)
    feed = Feed(specs, options.sources, Policy.of(options.policy), localizer.batch, notify)
    feed.repeats = lambda: options.repeat
    names = [each.name for each in feed.connections]
    live_run = LiveRun(names)
    photos = {each.name for each in feed.connections if kind_of(each.spec).alone}
    session = Session(
        feed.connections,
        live_run,
        localizer.class_names,
        stop=feed.stop,
        following=opened(following, localizer, photos=photos),
        notify=notify,
        limits=localizer.limits,
        names=localizer.names,
    )
    session.change(
        class_index=localizer.wanted_class,
        min_score=following.min_score,
        record=options.record,
        **{each.name: getattr(options, each.name) for each in fields(Look)},
    )
    files: dict[str, list[Path]] = {}
    with ExitStack() as stack:
        sinks = _sinks(stack, session, options, lost, notify, files)
        timeline = Timeline() if options.web is not None else None
        events = _event_sink(stack, sinks, feed.connections, options, lost, files, timeline)
        if options.web is not None:
            teacher = stack.enter_context(teacher_of(session)) if teacher_of else None
            if teacher is not None:
                sinks.append(teacher)
                stack.callback(lambda: files.update(teacher.written))
                feed.repeats = lambda: options.repeat or teacher.is_open
                where = displayable(str(options.labels_dir.resolve()))
                console.print(Text(f"labels made on the page go into {where}"), soft_wrap=True)
            page = stack.enter_context(
                _page(session, localizer, options.web, options, teacher, timeline)
            )
            _tell_where(page, console)
            if options.open_page:
                open_in_browser(page.url, notify)
        interrupted = stack.enter_context(_stopping_on_ctrl_c(session.stop))
        table = stack.enter_context(
            LiveTable(console=console, refresh_per_second=4, transient=True)
        )
        live = Live(lambda: session.settings, feed.stop)
        loop = run_frames(
            feed.frames(), localizer, sinks, live_run, live=live, following=session.following
        )
        if options.seconds is not None:
            timer = threading.Timer(options.seconds, session.stop)
            stack.callback(timer.cancel)
            timer.start()
        shown_s = 0.0
        try:
            for _ in stack.enter_context(closing(loop)):
                if time.monotonic() - shown_s >= TABLE_EVERY_S:
                    table.update(live_table(live_run.rolling(), feed.connections))
                    shown_s = time.monotonic()
        finally:
            _enter_left(feed, sinks, live_run)
    files["recording"] = [each.path for each in session.recorded]
    return {
        **_summary(feed, live_run, interrupted.is_set()),
        "files": {kind: list(map(str, paths)) for kind, paths in files.items() if paths},
        "shown_from": shown_from(following, localizer),
        **events.summary(),
        **lost.summary(),
        **localizer.summary(),
    }


def _tell_where(page: PageServer, console: Console) -> None:
    """Say where the page is. The lines are ``Text``: the token is there to be seen."""
    console.print(Text(f"watch on {page.url}"), soft_wrap=True)
    for url in page.urls_beyond:
        if url != page.url:
            console.print(Text(f"from other machines: {url}"), soft_wrap=True)
    if page.urls_beyond and console.is_terminal:
        code = qr_code(page.urls_beyond[0], console.width)
        if code is not None:
            console.print("with a phone in the same network, scan:")
            console.print(code)


def _event_sink(
    stack: ExitStack,
    sinks: list[Sink],
    connections: Sequence[Connection],
    options: StreamOptions,
    lost: Callable[[str], None],
    files: dict[str, list[Path]],
    timeline: Timeline | None,
) -> EventSink:
    """Finds events, which the summary tells, and others where they are asked for; it is put among
    the sinks, with the one that writes clips.
    """
    rules = {
        each.name: replace(
            rules_for(_photos(each.spec)),
            least_confidence=options.event_score,
            begins_after_s=options.event_seconds,
        )
        for each in connections
    }
    notifier = None
    if options.on_event is not None:
        receiver = receiver_of(options.on_event)
        notifier = Notifier(receiver, f"{shown(options.on_event)}, which is told of events,", lost)
    clips = None
    if options.event_clips is not None:
        clips = EventClips(options.event_clips, options.event_seconds, lost)
        sinks.append(stack.enter_context(Beside(clips, "the clips of events", lost)))
        files["clip"] = clips.written
    events = EventSink(rules, options.events, notifier, True, clips, timeline)
    sinks.append(stack.enter_context(Beside(events, "the file of events", lost)))
    return events


def _photos(spec: str) -> bool:
    kind = kind_of(spec)
    return kind.can_be_cut and kind.alone


def _summary(feed: Feed, live_run: LiveRun, interrupted: bool) -> dict[str, Any]:
    return {
        "source": ", ".join(each.spec for each in feed.connections),
        **live_run.summary(),
        "captured": feed.captured,
        "connections": [vars(each) for each in feed.connections],
        "interrupted": interrupted,
    }


def _check_outputs(options: StreamOptions) -> None:
    """Refuse names that nothing can be written to, before anything is opened.

    Raises:
        OutputError: an ending is wrong, or the log's name is that of another file.
    """
    if options.record is not None:
        checked_suffix(options.record, (".mp4",), "recording")
    if options.trace is not None:
        checked_suffix(options.trace, (".json",), "trace")
    if options.events is not None:
        checked_suffix(options.events, (".jsonl",), "file of events")
        check_log(options.events, renamed=False)
    if options.log is not None:
        check_log(options.log, options.log_max_mb is not None)


def _page(
    session: Session,
    localizer: Localizer,
    where: str,
    options: StreamOptions,
    teacher: Teacher | None,
    timeline: Timeline | None,
) -> PageServer:
    def title() -> str:
        """What runs now: a budget may change it."""
        engine = localizer.engine
        what = f"{label_of(engine.backend)} {engine.precision}"
        taught = isinstance(localizer, ReplaceableLocalizer) and localizer.is_replaced
        parts = [localizer.description.get("model", ""), what, f"{localizer.size_px} px"]
        parts.append("taught" if taught else "")
        return " · ".join(filter(None, parts))

    address = Address.of(where)
    token, folder = options.web_token, options.web_dir
    return PageServer(session, title, address, token, folder, teacher, timeline)


def _sinks(
    stack: ExitStack,
    session: Session,
    options: StreamOptions,
    lost: Callable[[str], None],
    notify: Callable[[str], None],
    files: dict[str, list[Path]],
) -> list[Sink]:
    """What cannot be begun ends the run before it starts; what fails later ends alone, and ``lost``
    says so. ``files`` gets what is written, by kind.
    """
    names = [each.name for each in session.connections]

    def failed(recording: Recording, error: Exception) -> None:
        name = displayable(str(recording.path))
        trouble = f"the recording {name} has ended: {in_words(error)}"
        session.recording_failed(recording, trouble)
        lost(f"{trouble}; the run goes on")

    def renamed(wanted: Path, path: Path) -> None:
        notify(displayable(f"there is a file {wanted} already: {path} is written"))

    def beside(sink: Sink, what: str) -> Sink:
        return stack.enter_context(Beside(sink, what, lost))

    if options.record is not None:
        make_writable(options.record)
    sinks: list[Sink] = []
    for wanted in (lambda: session.settings.recording, lambda: session.settings.page_recording):
        recorder = Recorder(wanted, names, failed, renamed, session.recording_begun)
        sinks.append(stack.enter_context(recorder))
    sinks.append(stack.enter_context(session))
    if options.window and has_display():
        sinks.append(beside(WindowSink("Sightline", session.stop), "the window"))
    if options.trace is not None:
        trace = TraceSink(options.trace, session.connections)
        if trace.path != options.trace:
            renamed(options.trace, trace.path)
        sinks.append(beside(trace, "the trace"))
        files["trace"] = [trace.path]
    if options.metrics is not None:
        sinks.append(
            beside(MetricsSink(options.metrics, session, options.web_token), "the metrics page")
        )
    if options.log is not None:
        sinks.append(
            beside(JsonlSink(options.log, live=True, max_mb=options.log_max_mb), "the log")
        )
        files["log"] = [options.log]
    if options.events is not None:
        files["events"] = [options.events]
    return sinks


def _enter_left(feed: Feed, sinks: Sequence[Sink], live_run: LiveRun) -> None:
    """A run that failed leaves frames behind that nobody took: they end here."""
    for record in feed.left():
        for sink in sinks:
            if not sink.needs_picture:
                sink.write(record, None)
        live_run.add(record)


@contextmanager
def _stopping_on_ctrl_c(stop: Callable[[], None]) -> Iterator[threading.Event]:
    """The first Ctrl-C ends the run in order, and sets the event; a second one ends it at once."""
    pressed = threading.Event()
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # signals reach the main thread only
        yield pressed
        return

    def on_signal(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


Summary = dict[str, Any]


def demo_chosen(
    frames: int | None, out: Path, choice: EngineOptions, budget_ms: float | None, console: Console
) -> list[Summary]:
    """Open the engine that is chosen, and localize so many frames of the demo's clip, or it once.

    Raises:
        SightlineError: the engine cannot be opened, or see ``process_all``.
    """
    specs = [f"demo:{frames or ''}"]
    size_px = first_size_px(specs)
    localizer = open_within(choice, budget_ms, console, streams=0, first_px=size_px)
    return process_all(specs, out, localizer, console)


def process_all(
    specs: Sequence[str],
    out: Path,
    localizer: Localizer,
    console: Console,
    video: bool = True,
    following: FollowOptions = WHOLE_FRAMES,
) -> list[Summary]:
    """Localize every frame of each source in turn; see ``process``.

    Args:
        specs: see ``realtime.sources.spec.open_source``.
        out: folder for the results.
        localizer: the engine, or the engines that a budget is held with.
        console: for progress bars and names.
        video: draw and encode, or only log.
        following: whether and what to follow.

    Returns:
        A summary of each; on Ctrl-C the last is that of the frames so far, with ``interrupted``
        true.

    Raises:
        SightlineError: a source cannot be read to its end or a result cannot be written; nothing of
            that source is left.
    """
    naming = Naming(
        out,
        partial(console.print, style="yellow", markup=False, highlight=False, soft_wrap=True),
        specs,
    )
    summaries: list[Summary] = []
    for spec in specs:
        found = process(spec, naming, out, localizer, console, video, following)
        summaries.append({"source": shown(spec), **found})
        if summaries[-1]["interrupted"]:
            break
    return summaries


def process(
    spec: str,
    naming: Naming,
    out: Path,
    localizer: Localizer,
    console: Console,
    video: bool,
    following: FollowOptions = WHOLE_FRAMES,
) -> Summary:
    """Localize every frame of a source.

    Writes ``NAME.mp4`` (with ``video``), ``NAME.jsonl``, ``NAME.events.jsonl``,
    ``NAME.latency.png`` and ``NAME.summary.json``; the summary, with the ``files`` by kind, is also
    returned. What a camera showed does not come again: each run gets a name that is free. The
    demo's results are renewed.
    """
    endings = {"video": ".mp4"} if video else {}
    endings |= {"log": ".jsonl", "events": ".events.jsonl", "latency_plot": ".latency.png"}
    endings["summary"] = ".summary.json"
    kind = kind_of(spec)
    with open_source(spec, SourceOptions(poll=False)) as source:
        found = naming.job(spec, endings.values(), kind.name if kind.repeats else uuid4().hex)
        with naming.holding(found) as job:
            files = {kind: with_ending(out / job.name, ending) for kind, ending in endings.items()}
            job.claim(files.values())
            try:
                asked = following.for_source(kind.alone)
                summary = _process(source, files, localizer, console, asked)
            except BaseException:
                job.discard()
                raise
            job.end([Path(path) for path in summary["files"].values()], summary)
    return summary


def _process(
    source: Source,
    files: dict[str, Path],
    localizer: Localizer,
    console: Console,
    following: FollowOptions,
) -> Summary:
    localizer.begin()
    run, interrupted = Run(), False
    try:
        with ExitStack() as stack:
            events = EventSink({source.name: rules_for(photos=False)}, files["events"])
            sinks: list[Sink] = [
                stack.enter_context(JsonlSink(files["log"])),
                stack.enter_context(events),
            ]
            if "video" in files:
                sinks.append(
                    stack.enter_context(
                        VideoSink(files["video"], source.time_base, source.rate_fps)
                    )
                )
            followed = opened(following, localizer)
            _run_with_progress(source, localizer, sinks, run, console, followed)
    except KeyboardInterrupt:
        interrupted = True
    if run.total_ms:
        title = f"{files['log'].stem}: time per frame"
        plot_latency(run.times, course_of(run), files["latency_plot"], title)
    else:
        files.pop("latency_plot")
    engine = localizer.engine
    summary: Summary = {
        **events.summary(),
        **run.summary(),
        "interrupted": interrupted,
        "backend": engine.backend,
        "precision": engine.precision,
        "device": engine.device,
        "size_px": localizer.size_px,
        "shown_from": shown_from(following, localizer),
        "files": {kind: str(path) for kind, path in files.items()},
        **localizer.summary(),
    }
    write_json(files["summary"], summary)
    return summary


def _run_with_progress(
    source: Source,
    localizer: Localizer,
    sinks: Sequence[Sink],
    run: Run,
    console: Console,
    following: Following | None,
) -> None:
    counts = (MofNCompleteColumn(), TextColumn("{task.fields[fps]}"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), *counts, console=console) as bar:
        task = bar.add_task(escape(source.name), total=source.frames, fps="")
        with closing(
            run_frames(every_frame(source), localizer, sinks, run, following=following)
        ) as records:
            for _ in records:
                bar.update(task, advance=1, fps=f"{run.fps:.0f} fps")
