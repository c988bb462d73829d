"""A driver for NVIDIA GPUs that is simulated: contexts, streams, events, memory, CUDA graphs, and
work that is done late.

``SimulatedDriver`` has the functions of ``cuda.bindings.driver``. ``Library`` is the same as
ctypes sees it, ``Pycuda`` as pycuda gives it, with pycuda's rules of who owns a context.

Work that is put on a stream is done in steps, later: some at any call of the driver, the rest when
somebody waits for it. Which stream goes on is chosen by whoever makes the driver, so that every
order that a GPU may take can be gone through. Memory holds rubbish until it is written, and what a
copy or an execution is about to write is rubbish until it is done. What a GPU would get silently
wrong goes into ``races``: memory that is changed, freed or written by another stream meanwhile.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np

POISON = 0xAB
OK, OUT_OF_MEMORY, NO_CONTEXT, BAD_HANDLE, NOT_READY = 0, 2, 201, 400, 600
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, CAPTURE_UNMATCHED, WRONG_THREAD = 900, 901, 903, 908
ILLEGAL_STATE = 401
PRIMARY = 0xC0
NOT_WHILE_CAPTURING = frozenset({"cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuMemFreeHost"})


class Deadlock(AssertionError):
    """A wait that never ends."""


class Work:
    """Something on a stream: ``steps`` one after the other, once ``ready`` says so.

    ``reads`` and ``writes`` are (address, bytes).
    """

    def __init__(self, steps, reads=(), writes=(), ready=lambda: True, begin=lambda: None):
        self.steps, self.reads, self.writes = steps, tuple(reads), tuple(writes)
        self.ready, self.begin, self.done_steps = ready, begin, 0

    def again(self):
        """The same, to be done once more: what a graph's launch puts on its stream."""
        return Work(self.steps, self.reads, self.writes, self.ready, self.begin)

    def meets(self, other):
        """Whether one writes what the other reads or writes."""
        pairs = [(self.writes, other.reads + other.writes), (self.reads, other.writes)]
        return any(a < d + n and d < a + m for x, y in pairs for a, m in x for d, n in y)


class Mark:
    """One recording of an event."""

    done, at_ms = False, 0.0


class SimulatedDriver:
    """See ``cuda.bindings.driver``: each call returns a code, and a value where it has one.

    Args:
        choose: gives a number below the one it is given; 0 always: nothing is done before somebody
            waits for it, and streams go on one by one.

    Attributes:
        alive: how many things of each kind there are.
        failing: name of a call to the code that it returns.
        interrupted: whether the next wait is ended by Ctrl-C.
        races: what makes uncertain what a GPU computes, in words.
    """

    def __init__(self, choose: Callable[[int], int] = lambda count: 0):
        self.choose, self.failing, self.interrupted, self.races = choose, {}, False, []
        self.alive = dict.fromkeys(("context", "stream", "event", "device", "host", "graph"), 0)
        self.streams, self.events, self.memory, self.graphs, self.captures = {}, {}, {}, {}, {}
        self.leaving = []  # queues of streams that were destroyed with work left
        self.stacks, self.ticks, self.log = {}, 0, []
        self._lock, self._handles = threading.RLock(), iter(range(0x100, 1 << 30))

    # What the GPU does by itself

    def _queues(self):
        return [stream.queue for stream in self.streams.values()] + self.leaving

    def _able(self):
        return [queue for queue in self._queues() if queue and queue[0].ready()]

    def _step(self, queue):
        work = queue[0]
        if work.done_steps == 0:
            for other in self._queues():
                if other is not queue and other and other[0].done_steps and work.meets(other[0]):
                    self.races.append(
                        "two streams use the same memory at once, and one of them writes"
                    )
            for address, _ in (*work.reads, *work.writes):
                if address not in self.memory:
                    self.races.append("work is done on memory that was freed")
        work.steps[work.done_steps]()
        work.done_steps += 1
        self.ticks += 1
        if work.done_steps == len(work.steps):
            queue.pop(0)

    def _go_on(self):
        """Mostly by nothing: the processor is ahead of the GPU."""
        for _ in range(self.choose(8) - 5):
            if able := self._able():
                self._step(able[self.choose(len(able))])

    def _until(self, over):
        if self.interrupted:
            self.interrupted = False
            raise KeyboardInterrupt
        while not over():
            able = self._able()
            if not able:
                raise Deadlock("this wait never ends")
            self._step(able[self.choose(len(able))])

    def _call(self, name, context=True):
        """The code of a call that fails before it does anything."""
        if name in self.failing:
            return self.failing[name]
        mine = [c for c in self.captures.values() if c.thread == threading.get_ident()]
        if mine and name in NOT_WHILE_CAPTURING:
            mine[0].broken = True
            return CAPTURE_UNSUPPORTED
        self._go_on()
        return NO_CONTEXT if context and not self._stack() else OK

    def _stack(self):
        return self.stacks.setdefault(threading.get_ident(), [])

    def _new(self, kind):
        self.alive[kind] += 1
        return next(self._handles)

    # Contexts

    def cuInit(self, flags):
        return (OK,)

    def cuDeviceGet(self, index):
        return (OK if index == 0 else 101, index)

    def cuDevicePrimaryCtxRetain(self, device):
        code = self._call("cuDevicePrimaryCtxRetain", context=False)
        self.alive["context"] += code == OK
        return (code, PRIMARY)

    def cuDevicePrimaryCtxRelease(self, device):
        self.alive["context"] -= 1
        assert self.alive["context"] >= 0, "the primary context was given back twice"
        return (OK,)

    def cuCtxPushCurrent(self, context):
        self._stack().append(context)
        return (OK,)

    def cuCtxPopCurrent(self):
        return (OK, self._stack().pop()) if self._stack() else (NO_CONTEXT, 0)

    def cuCtxGetCurrent(self):
        return (OK, self._stack()[-1] if self._stack() else 0)

    # Streams and events

    def cuStreamCreate(self, flags):
        with self._lock:
            if code := self._call("cuStreamCreate"):
                return (code, 0)
            self.log.append(f"stream {flags}")
            handle = self._new("stream")
            self.streams[handle] = SimpleNamespace(queue=[])
            return (OK, handle)

    def cuStreamDestroy(self, stream):
        with self._lock:
            if code := self._call("cuStreamDestroy"):
                return (code,)
            self.alive["stream"] -= 1
            self.leaving.append(self.streams.pop(int(stream)).queue)
            return (OK,)

    def cuStreamSynchronize(self, stream):
        with self._lock:
            if code := self._call("cuStreamSynchronize"):
                return (code,)
            if capture := self.captures.get(int(stream)):
                capture.broken = True
                return (CAPTURE_UNSUPPORTED,)
            queue = self.streams[int(stream)].queue
            self._until(lambda: not queue)
            return (OK,)

    def cuStreamWaitEvent(self, stream, event, flags):
        with self._lock:
            if code := self._call("cuStreamWaitEvent"):
                return (code,)
            mark = self.events[int(event)]
            if mark is not None:
                self._put(stream, Work([lambda: None], ready=lambda: mark.done))
            return (OK,)

    def cuEventCreate(self, flags):
        with self._lock:
            if code := self._call("cuEventCreate"):
                return (code, 0)
            self.log.append(f"event {flags}")
            handle = self._new("event")
            self.events[handle] = None
            return (OK, handle)

    def cuEventDestroy(self, event):
        with self._lock:
            if code := self._call("cuEventDestroy"):
                return (code,)
            self.alive["event"] -= 1
            del self.events[int(event)]
            return (OK,)

    def cuEventRecord(self, event, stream):
        with self._lock:
            if code := self._call("cuEventRecord"):
                return (code,)
            mark = self.events[int(event)] = Mark()

            def reach():
                mark.done, mark.at_ms = True, float(self.ticks)

            self._put(stream, Work([reach]))
            return (OK,)

    def cuEventSynchronize(self, event):
        with self._lock:
            if code := self._call("cuEventSynchronize"):
                return (code,)
            mark = self.events[int(event)]
            self._until(lambda: mark is None or mark.done)
            return (OK,)

    def cuEventQuery(self, event):
        with self._lock:
            if code := self._call("cuEventQuery"):
                return (code,)
            mark = self.events[int(event)]
            if mark is None or mark.done:
                return (OK,)
            able = self._able()
            if not able:
                raise Deadlock("this wait never ends")
            self._step(able[self.choose(len(able))])  # or who asks again and again asks for ever
            return (NOT_READY,)

    def cuEventElapsedTime(self, begin, end):
        marks = [self.events[int(each)] for each in (begin, end)]
        if not all(mark and mark.done for mark in marks):
            return (NOT_READY, 0.0)
        return (OK, marks[1].at_ms - marks[0].at_ms)

    # Memory

    def _had(self, kind, size):
        block = np.full(size + 256, POISON, np.uint8)
        address = -(-block.ctypes.data // 256) * 256
        self.alive[kind] += 1
        self.memory[address] = (kind, size, block)
        return address

    def cuMemAlloc(self, size):
        with self._lock:
            code = self._call("cuMemAlloc")
            return (code, 0 if code else self._had("device", size))

    def cuMemHostAlloc(self, size, flags):
        with self._lock:
            code = self._call("cuMemHostAlloc")
            return (code, 0 if code else self._had("host", size))

    def _freed(self, call, address):
        with self._lock:
            if code := self._call(call):
                return (code,)
            kind, size, block = self.memory[int(address)]
            mine = Work([], writes=[(int(address), size)])
            if any(work.meets(mine) for queue in self._queues() for work in queue):
                self.races.append("memory is freed while work on it is under way")
            del self.memory[int(address)]
            block[:] = POISON
            self.alive[kind] -= 1
            return (OK,)

    def cuMemFree(self, address):
        return self._freed("cuMemFree", address)

    def cuMemFreeHost(self, address):
        return self._freed("cuMemFreeHost", address)

    def cuMemcpyHtoDAsync(self, device, host, size, stream):
        with self._lock:
            if code := self._call("cuMemcpyHtoDAsync"):
                return (code,)
            self._copy(int(device), int(host), size, stream)
            return (OK,)

    def cuMemcpyDtoHAsync(self, host, device, size, stream):
        with self._lock:
            if code := self._call("cuMemcpyDtoHAsync"):
                return (code,)
            bytes_at(int(host), size)[:] = POISON
            self._copy(int(host), int(device), size, stream)
            return (OK,)

    def _copy(self, to, of, size, stream):
        """In two halves, so that a change between them shows."""
        half, begun = size // 2, []

        def first():
            begun[:] = [bytes_at(of, size).copy()]
            bytes_at(to, half)[:] = bytes_at(of, half)

        def second():
            if not np.array_equal(begun[0], bytes_at(of, size)):
                self.races.append("memory was changed while it was copied")
            bytes_at(to, size)[half:] = bytes_at(of, size)[half:]

        self._put(stream, Work([first, second], reads=[(of, size)], writes=[(to, size)]))

    def execute(self, stream, reads, writes, compute):
        """Put the execution of a plan on a stream.

        Args:
            stream: its handle.
            reads, writes: (address, bytes) of its tensors.
            compute: reads and writes them.
        """
        seen = []

        def begin():
            seen[:] = [bytes_at(*place).copy() for place in reads]
            for place in writes:
                bytes_at(*place)[:] = POISON

        def end():
            if any(not np.array_equal(a, bytes_at(*b)) for a, b in zip(seen, reads, strict=True)):
                self.races.append("an input was changed while it was read")
            compute()

        with self._lock:
            if code := self._call("execute"):
                return code
            blocks = [self._block_of(place) for place in (*reads, *writes)]
            inputs, outputs = blocks[: len(reads)], blocks[len(reads) :]
            self._put(stream, Work([begin, lambda: None, end], set(inputs), set(outputs)))
            return OK

    def _block_of(self, place):
        """(address, bytes) of the block that a tensor lies in."""
        for address, (_, size, _) in self.memory.items():
            if address <= place[0] and place[0] + place[1] <= address + size:
                return address, size
        raise AssertionError("a tensor lies in no memory that was had")

    # CUDA graphs

    def _put(self, stream, work):
        capture = self.captures.get(int(stream))
        if capture is not None:
            capture.recorded.append(work)
        elif int(stream) not in self.streams:
            self.races.append("work is put on a stream that was destroyed")
        else:
            self.streams[int(stream)].queue.append(work)

    def begin_capture(self, stream):
        with self._lock:
            if code := self._call("cuStreamBeginCapture"):
                return code
            if stream in self.captures or stream not in self.streams:
                return ILLEGAL_STATE
            assert not self.streams[stream].queue, "a capture begins before the stream is idle"
            thread = threading.get_ident()
            self.captures[stream] = SimpleNamespace(recorded=[], broken=False, thread=thread)
            return OK

    def end_capture(self, stream):
        with self._lock:
            if stream not in self.captures:
                return CAPTURE_UNMATCHED, 0
            if self.captures[stream].thread != threading.get_ident():
                return WRONG_THREAD, 0
            capture = self.captures.pop(stream)
            if code := self._call("cuStreamEndCapture"):
                return code, 0
            if capture.broken:
                return CAPTURE_INVALIDATED, 0
            handle = self._new("graph")
            self.graphs[handle] = capture.recorded
            return OK, handle

    def instantiate(self, graph):
        with self._lock:
            if code := self._call("cuGraphInstantiateWithFlags"):
                return code, 0
            handle = self._new("graph")
            self.graphs[handle] = self.graphs[graph]
            return OK, handle

    def launch(self, graph, stream):
        with self._lock:
            if code := self._call("cuGraphLaunch"):
                return code
            for work in self.graphs[graph]:
                self._put(stream, work.again())
            return OK

    def destroy_graph(self, graph):
        with self._lock:
            self.alive["graph"] -= 1
            del self.graphs[graph]
            return OK

    # For tests

    @property
    def waiting(self):
        """How many things are on streams and not done."""
        return sum(map(len, self._queues()))

    @property
    def current(self):
        """Contexts on the stacks of all threads."""
        return [context for stack in self.stacks.values() for context in stack]


class Library:
    """The driver's library, as ctypes opens it: as much as ``engines.backends.cuda`` calls."""

    def __init__(self, driver):
        self.driver, self.launched, self.captured = driver, 0, 0

    def cuInit(self, flags):
        return OK

    def cuCtxGetCurrent(self, out):
        code, out._obj.value = self.driver.cuCtxGetCurrent()
        return code

    def cuCtxPopCurrent_v2(self, out):
        code, out._obj.value = self.driver.cuCtxPopCurrent()
        return code

    def cuCtxPushCurrent_v2(self, context):
        return self.driver.cuCtxPushCurrent(context.value)[0]

    def cuStreamBeginCapture_v2(self, stream, mode):
        return self.driver.begin_capture(stream.value)

    def cuStreamEndCapture(self, stream, out):
        code, graph = self.driver.end_capture(stream.value)
        out._obj.value = graph or None
        return code

    def cuGraphInstantiateWithFlags(self, out, graph, flags):
        code, executable = self.driver.instantiate(graph.value)
        out._obj.value = executable or None
        self.captured += code == OK
        return code

    def cuGraphLaunch(self, executable, stream):
        self.launched += 1
        return self.driver.launch(executable.value, stream.value)

    def cuGraphExecDestroy(self, executable):
        return self.driver.destroy_graph(executable.value)

    def cuGraphDestroy(self, graph):
        return self.driver.destroy_graph(graph.value)


class Pycuda:
    """``pycuda.driver``, as much of it as is used, with its rules (``cuda.hpp`` of 2026.1).

    It has a stack of contexts of its own for each thread, of which only the uppermost is on the
    driver's. A context is given back by ``detach`` where it is current or where it was retained, and
    silently kept elsewhere; giving it back leaves it on the driver's stack. What is dropped where
    its context is not current and was not retained stays allocated.
    """

    event_flags = SimpleNamespace(DEFAULT=0, BLOCKING_SYNC=1, DISABLE_TIMING=2)

    class Error(Exception):
        """What pycuda raises."""

    def __init__(self, driver: SimulatedDriver):
        self.driver, self.stacks = driver, {}
        face = self

        class Context:
            def __init__(self, handle):
                self.handle, self.valid, self.thread = handle, True, threading.get_ident()

            def push(self):
                if face.stack():
                    driver.cuCtxPopCurrent()
                driver.cuCtxPushCurrent(self.handle)
                face.stack().append(self)

            @staticmethod
            def pop():
                if not face.stack():
                    raise face.Error("cannot pop non-current context")
                driver.cuCtxPopCurrent()
                face.stack().pop()
                if upper := face.upper():
                    driver.cuCtxPushCurrent(upper.handle)

            def detach(self):
                if not self.valid:
                    raise face.Error("cannot detach from invalid context")
                was_current = face.upper() is self
                if was_current:
                    driver.cuDevicePrimaryCtxRelease(0)
                elif self.thread == threading.get_ident():
                    driver.cuCtxPushCurrent(self.handle)
                    driver.cuDevicePrimaryCtxRelease(0)
                self.valid = False
                if was_current and (upper := face.upper()):
                    driver.cuCtxPushCurrent(upper.handle)

            def __del__(self):
                if self.valid:
                    self.detach()

        class Thing:
            """Is of the context that is current as it is made."""

            def __init__(self, handle, free):
                self.handle, self.free, self.ward = handle, free, face.upper()
                assert self.ward is not None, "no currently active context"

            def __int__(self):
                return self.handle

            def __del__(self):
                if not hasattr(self, "ward"):
                    return
                here = threading.get_ident()
                if face.upper() is self.ward:
                    self.free(self.handle)
                elif self.ward.valid and self.ward.thread == here:
                    self.ward.push()
                    self.free(self.handle)
                    self.ward.pop()

        class Stream(Thing):
            def __init__(self, flags=0):
                super().__init__(face.made(driver.cuStreamCreate(flags)), driver.cuStreamDestroy)

            def synchronize(self):
                face.made(driver.cuStreamSynchronize(self.handle))

            def wait_for_event(self, event):
                face.made(driver.cuStreamWaitEvent(self.handle, event.handle, 0))

        class Event(Thing):
            def __init__(self, flags=0):
                super().__init__(face.made(driver.cuEventCreate(flags)), driver.cuEventDestroy)

            def record(self, stream):
                face.made(driver.cuEventRecord(self.handle, stream.handle))

            def synchronize(self):
                face.made(driver.cuEventSynchronize(self.handle))

            def query(self):
                (code,) = driver.cuEventQuery(self.handle)
                return False if code == NOT_READY else face.made((code, True))

            def time_till(self, later):
                return face.made(driver.cuEventElapsedTime(self.handle, later.handle))

        self.Context, self.Stream, self.Event, self._thing = Context, Stream, Event, Thing

    def Device(self, index):
        def retain():
            return self.Context(self.made(self.driver.cuDevicePrimaryCtxRetain(index)))

        return SimpleNamespace(retain_primary_context=retain)

    def mem_alloc(self, size):
        return self._thing(self.made(self.driver.cuMemAlloc(size)), self.driver.cuMemFree)

    def pagelocked_empty(self, size, dtype):
        address = self.made(self.driver.cuMemHostAlloc(size, 0))
        owner = self._thing(address, self.driver.cuMemFreeHost)
        data = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}
        owner.__array_interface__ = data
        return np.asarray(owner)

    def memcpy_htod_async(self, device, host, stream):
        call = self.driver.cuMemcpyHtoDAsync
        self.made(call(int(device), host.ctypes.data, host.nbytes, stream.handle))

    def memcpy_dtoh_async(self, host, device, stream):
        call = self.driver.cuMemcpyDtoHAsync
        self.made(call(host.ctypes.data, int(device), host.nbytes, stream.handle))

    def made(self, answer: Sequence):
        """The value of a call that did not fail."""
        if answer[0] != OK:
            raise self.Error(f"a call of the driver failed: error {answer[0]}\nmore")
        return answer[1] if len(answer) > 1 else None

    def stack(self):
        return self.stacks.setdefault(threading.get_ident(), [])

    def upper(self):
        """The context that is current in this thread; those that were given back are dropped."""
        while self.stack() and not self.stack()[-1].valid:
            self.stack().pop()
        return self.stack()[-1] if self.stack() else None


def bytes_at(address, size):
    """The memory at an address."""
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)
