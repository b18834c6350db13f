"""The runner: a loaded bundle. Numpy in, numpy out.

::

    from l2c_export.runtime import Runner

    runner = Runner.load("bundle")
    latents = runner.sample([0, 0, 0], seed=0)  # (3, C, H, W) float32: three images of class 0

Labels and noise may also be lists or anything with ``__dlpack__`` in CPU memory, such as a tensor of
another framework; results have ``__dlpack__`` as every numpy array has.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import CONDITIONING, WEIGHTS, Bundle, read_bundle
from l2c_export.errors import UnsupportedError
from l2c_export.runtime.backends import Backend, LoadedGraph, Reschedulable, load_backend
from l2c_export.runtime.inputs import batches, check_batch, check_labels, check_noise
from l2c_export.runtime.noise import NoiseSource, check_call_noise, given_noise, seeded_noise
from l2c_export.runtime.sampler_state import Floats
from l2c_export.runtime.session import AnySession, StreamSession

Callback = Callable[[int, float, Floats], None]
"""Takes a call's index, its timestep and the (batch, C, H, W) latent after it.

The latent is the session's own: copy what is to be kept; what is changed in it goes into the next call.
Where labels need several batches it is called for each batch in turn, from index 0 again.
"""

_IDLE_SESSIONS = 4  # that keep their buffers for the next sample()


class Runner:
    """A loaded bundle: one set of weights for any number of sessions and threads.

    Attributes:
        bundle: The bundle.
        manifest: The program that it runs: the bundle's, unless :meth:`with_schedule` made the runner.
        backend: What runs the graphs.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self.manifest = backend.manifest
        self.backend = backend
        self._graphs: dict[str, LoadedGraph] = {}
        self._loading = threading.Lock()
        self._idle: list[AnySession] = []
        self._lending = threading.Lock()

    @classmethod
    def load(
        cls, path: str | Path, backend: str = "ort", threads: int | None = None, **options: Any
    ) -> Runner:
        """Check every file of a bundle, and load the graphs of its program.

        A backend sees no graph before its file is checked; the weights are checked meanwhile.

        Args:
            path: The bundle's folder.
            backend: A name from :data:`l2c_export.runtime.backends.BACKENDS`.
            threads: For each call; None is the backend's choice.
            options: Of the backend: of those that run engines ``graphs``, what one launch runs,
                ``device``, the number of the GPU, ``engines``, the name of a folder of engines
                where several fit, and ``per``, ``"sublayer"`` for those that serve every schedule;
                of ``ort`` ``packed``, False not to use weights that are packed for this CPU. None
                is as if it were not given.

        Raises:
            L2CError: There is no bundle, a file is not what was built, or the backend is not
                installed or cannot load a graph.
        """
        bundle = read_bundle(Path(path))
        files = bundle.manifest.files.keys()
        bundle.check_files(files - {WEIGHTS})
        with ThreadPoolExecutor(1) as pool:
            checked = pool.submit(bundle.check_files, files & {WEIGHTS})
            try:
                runner = cls(bundle, load_backend(backend, bundle, threads, options))
                for name in (CONDITIONING, *runner.manifest.step_graphs()):
                    runner.graph(name)
            finally:
                checked.result()  # says that weights are damaged, not what a backend makes of them
        return runner

    def with_schedule(self, reuse: Any) -> Runner:
        """A runner of the same engines and weights that follows another schedule.

        Args:
            reuse: (calls, slots) bool, noisiest call first: True reuses what the slot stored last.

        Raises:
            UnsupportedError: The backend runs an engine for each step graph, not for each kind of
                sub-layer.
            L2CError: The schedule has other sizes, or reuses what no earlier call computed.
        """
        if not isinstance(self.backend, Reschedulable):
            raise UnsupportedError(
                f"{self.backend.version} runs the bundle's own schedule alone; engines that serve any "
                f"are built with: l2c-export engines {self.bundle.path} --per sublayer, and run with "
                "--backend rtx, trt or ort-cuda"
            )
        return Runner(self.bundle, self.backend.with_schedule(reuse))

    def graph(self, name: str) -> LoadedGraph:
        """A graph of the manifest, loaded when it is first asked for."""
        with self._loading:
            if name not in self._graphs:
                self._graphs[name] = self.backend.load(name)
            return self._graphs[name]

    def session(self, batch: int) -> AnySession:
        """Make the buffers for trajectories of ``batch`` latents.

        Raises:
            L2CError: The bundle was not built for this batch.
        """
        return self.backend.session(self, batch)

    def sample(
        self,
        labels: Any,
        *,
        noise: Any = None,
        seed: int | None = None,
        guidance_scale: float | None = None,
        cached: bool = True,
        call_noise: Any = None,
        callback: Callback | None = None,
    ) -> Floats:
        """Sample any number of latents. Several threads may do so at once.

        More than the bundle's largest batch are sampled a batch after another; fewer than its
        smallest are repeated to fill it, and the repeats are dropped.

        Args:
            labels: (N,) integer classes, at least one.
            noise: (N, C, H, W) float32 to start from, instead of ``seed``.
            seed: Start from ``numpy.random.default_rng(seed).standard_normal`` of (N, C, H, W) in
                float32, whatever the batches. Where the sampler is stochastic, the noise of the
                calls comes from the seed too, and noise may be given beside it. Without a seed,
                every run draws other noise.
            guidance_scale: Of classifier-free guidance; None is the bundle's own.
            cached: False computes everything in every call.
            call_noise: (calls, N, C, H, W) float32: what the calls of a stochastic sampler draw.
            callback: Called after each call of each batch in turn; may raise to stop. On a device
                every call is then launched by itself and waited for.

        Returns:
            (N, C, H, W) latents: a new array.

        Raises:
            L2CError: An argument does not fit this bundle.
        """
        labels = check_labels(self.manifest, labels)
        noise = check_noise(self.manifest, len(labels), noise, seed)
        draw = self._call_noise(len(labels), call_noise, seed)
        done = [
            self._trajectory(
                labels[part], noise[part], guidance_scale, cached, draw(part.tolist()), callback
            )[:fresh]
            for part, fresh in batches(len(labels), self.manifest.batch)
        ]
        return np.concatenate(done)

    def enqueue(
        self,
        labels: Any,
        stream: int,
        *,
        noise: Any = None,
        seed: int | None = None,
        guidance_scale: float | None = None,
        cached: bool = True,
        call_noise: Any = None,
        out: Any = None,
    ) -> Any:
        """Sample one batch in device memory, in the order of a stream, without waiting for it.

        The work waits for what is on the stream now, and what comes next on the stream waits for it.
        The host waits for none of it, but where it is two trajectories ahead: for the older one. What
        does wait is giving memory back, as where an earlier result is dropped: ``out`` avoids it.

        Args:
            labels: (N,) integer classes in host memory; N in the range that the bundle was built for.
            stream: A CUDA stream's handle, such as ``torch.cuda.current_stream().cuda_stream``.
            noise: As for :meth:`sample`; or on the device, by ``__dlpack__``, and then not looked at
                for NaN.
            seed: As for :meth:`sample`.
            guidance_scale: As for :meth:`sample`.
            cached: As for :meth:`sample`.
            call_noise: As for :meth:`sample`.
            out: (N, C, H, W) float32 on the device, by ``__dlpack__``: where the latents go.

        Returns:
            ``out``, or without it a :class:`~l2c_export.runtime.device.arrays.DeviceArray` with
            ``__dlpack__`` and ``numpy()``.

        Raises:
            UnsupportedError: The backend has no device.
            L2CError: An argument does not fit this bundle.
        """
        labels = check_labels(self.manifest, labels)
        check_batch(self.manifest, len(labels))
        if not self.backend.streams:
            raise UnsupportedError(f"{self.backend.version} has no stream: use sample()")
        with self._lent(len(labels)) as session:
            on_device = cast(StreamSession, session)
            on_device.start(
                labels,
                noise,
                guidance_scale,
                cached,
                seed=seed,
                call_noise=call_noise,
                stream=stream,
            )
            on_device.run()
            return on_device.result(out)

    def _call_noise(
        self, count: int, given: Any, seed: int | None
    ) -> Callable[[list[int]], NoiseSource | None]:
        """A function that makes the noise of the calls for some of the images."""
        if given is not None:
            noise = check_call_noise(self.manifest, count, given)
            return lambda part: given_noise(noise[:, part])
        if not self.manifest.stochastic:
            return lambda part: None
        entropy = secrets.randbits(128) if seed is None else seed
        return lambda part: seeded_noise(entropy, part)

    def _trajectory(
        self,
        labels: NDArray[np.int64],
        noise: Floats,
        guidance_scale: float | None,
        cached: bool,
        call_noise: NoiseSource | None,
        callback: Callback | None,
    ) -> Floats:
        """Run one batch from noise to latents."""
        with self._lent(len(labels)) as session:
            session.start(labels, noise, guidance_scale, cached, call_noise=call_noise)
            if callback is None:
                session.run()
            else:
                for call in session:
                    callback(call.index, call.timestep, call.x)
            return session.x.copy()

    @contextmanager
    def _lent(self, batch: int) -> Iterator[AnySession]:
        """A session that is nobody else's meanwhile."""
        with self._lending:
            session = next((s for s in reversed(self._idle) if s.batch == batch), None)
            if session is not None:
                self._idle.remove(session)
        session = session or self.session(batch)
        try:
            yield session
        finally:
            with self._lending:
                self._idle.append(session)
                del self._idle[:-_IDLE_SESSIONS]
