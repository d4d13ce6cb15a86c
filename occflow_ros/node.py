"""The lifecycle node: parameters, topics, callbacks that only sort, and a worker that thinks.

    images -> checked -> collector -> mailbox (one place, the newest set wins) -> worker -> pipeline -> publishers

configure reads the parameters, loads and warms up the model and listens to calibration and TF; activate listens to the
images and starts the worker; deactivate and cleanup give back what the two took.
"""

import gc
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import State
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import (
    DurabilityPolicy,
    LivelinessPolicy,
    QoSProfile,
    ReliabilityPolicy,
    qos_policy_name_from_kind,
)
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from std_srvs.srv import Trigger
from visualization_msgs.msg import MarkerArray

from occflow_core.runtime import Stream, built, load
from occflow_core.types import NANO

from . import convert, frames, parameters
from .approximate import Approximate, matcher
from .assemble import Calibration, Collector, Gatherer, ImageSet, Mailbox, Scans, Shot, Watch
from .convert import Refused
from .health import LIDAR, Health, resident_mb
from .parameters import ParameterProblem, Settings
from .pipeline import Pipeline, Served

HASH = 12  # characters of the weights' SHA-256 that are told: enough to tell files apart
# of a set, as `Pipeline`, `Stream` and this node time them; `scans` only where there is a LiDAR
STAGES = ("decode", "scans", "assemble", "prepare", "network", "voxels", "visibility", "convert", "publish", "total")
POLLS = 5  # looks at the open sets within one deadline: a set leaves at most a fifth of it late
BEAT, LEASE = 0.25, 1.0  # s between two heartbeats, by the steady clock; s without one after which DDS tells who asks
STUCK = 10.0  # s that one set may take, twenty times what it takes on two cores; a worker that hangs has no heartbeat
LOST = 20  # sets lost in a row by errors after which the model is made anew; and after as many more the node ends
RETRY = 1.0  # s between two attempts to activate, where `autostart` and `startup_wait` ask for what is not there yet


class NotReady(RuntimeError):
    """What activation was told to wait for did not come; the text names it."""


@dataclass(frozen=True)
class Letter:
    """What the callbacks hand to the worker."""

    images: ImageSet
    arrived: float  # s, steady: when the set was closed


class OccupancyNode(LifecycleNode):
    """Six cameras (and a LiDAR, where the model needs one) in, `~/occupancy`, `~/points`, `~/markers`, `~/heartbeat`
    and `/diagnostics` out."""

    def __init__(self, **arguments):
        super().__init__("occflow", **arguments)
        parameters.declare(self)
        self._folders = parameters.named_folders(self)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self.settings: Settings | None = None
        self.health: Health | None = None
        self.failure: str | None = None  # what the node cannot go on with: whoever spins it ends the process
        self.waiting = False  # whether the last activation failed for what may still come
        self._worker: threading.Thread | None = None
        self.left: threading.Thread | None = None  # a worker that did not end: no exit would wait long enough for it
        # calibration, TF and the heartbeat go on while a transition takes its time
        self._known = MutuallyExclusiveCallbackGroup()
        for service in self.services:
            if service.srv_type is ChangeState:
                service.callback = self._refusing(service.callback)
        self._reset()

    def _reset(self) -> None:
        self._configured, self._activated = [], []  # what to destroy at cleanup, at deactivate
        self._model = self._stream = self._collector = self._transforms = self._scans = None
        self._calibrations: list[Calibration | None] = []
        self._infos: list[tuple | None] = []  # what each camera's latest CameraInfo said, and what came of it
        self._sources: dict[str, str] = {}  # topic of a sensor, as remapped -> its name for `Health`
        self._latest_set: int | None = None  # ns: the stamp of the newest set, whatever became of it
        self._busy: float | None = None  # s, steady: since when the worker has been at one set
        self._renewing = False  # the worker makes the model anew: that takes what it takes

    @property
    def state(self) -> str:
        """The lifecycle state: unconfigured, inactive, active or finalized, or the name of a transition."""
        return self._state_machine.current_state[1]

    # ---- lifecycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        # rclpy turns what a transition throws into an error state without a word, and leaves what was begun
        try:
            self._configure()
            return TransitionCallbackReturn.SUCCESS
        except Exception as problem:
            self.get_logger().error(f"configure failed: {problem}")
            self._give_back()
            return TransitionCallbackReturn.FAILURE

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            self._activate()
            return super().on_activate(state)  # opens the lifecycle publishers
        except Exception as problem:
            self.waiting = isinstance(problem, NotReady)
            self.get_logger().error(f"activate failed: {problem}")
            self._stop()
            return TransitionCallbackReturn.FAILURE

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop()
        self._model = self._stream = None  # an inactive node takes no memory of a GPU; activate loads again
        _free()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._give_back()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.on_cleanup(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.on_cleanup(state)

    def _refusing(self, change: Callable) -> Callable:
        """rclpy's callback, but what cannot be had in a state is answered with no: rclpy ends the executor for it."""

        def call(request: ChangeState.Request, response: ChangeState.Response) -> ChangeState.Response:
            try:
                return change(request, response)
            except RuntimeError:  # of rcl, before anything has begun
                asked = request.transition.label or request.transition.id
                self.get_logger().warning(f"transition {asked} cannot be had while the node is {self.state}")
                response.success = False
                return response

        return call

    def _configure(self) -> None:
        self.settings = s = parameters.read(self, self._folders)
        if s.threads:
            torch.set_num_threads(s.threads)
        self._load()
        sweeps = self._model.system.config.sweeps
        quiet = max(2.0, 3.0 / s.camera_rate)
        self.health = Health(s.cameras, self._model.name, quiet, sweeps > 0, s.min_cameras, s.clock_jump)
        self.health.tell("trained", str(self._model.trained).lower())
        self.health.tell("backend", s.backend)
        self.health.tell("precision", s.precision)
        self.health.tell("weights SHA-256", (self._model.weights or "none: random")[:HASH])
        self._transforms = frames.buffer(jump=s.clock_jump)
        self._calibrations, self._infos = [None] * len(s.cameras), [None] * len(s.cameras)
        self._out = self._offer(_message("occflow_msgs", "VoxelFlow"), "~/occupancy")
        self._out_points = self._offer(PointCloud2, "~/points")
        self._out_markers = self._offer(MarkerArray, "~/markers")
        kind = convert.time_kind()
        names = ["cyclic_time", "pipeline_latency"]
        names += [f"processing_time/{stage}" for stage in STAGES if sweeps or stage != "scans"]
        self._out_times = {name: self._offer(kind, f"~/debug/{name}_ms") for name in names}
        self._out_diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._configured.append((self.destroy_publisher, self._out_diagnostics))
        # a steady clock: timers of the ROS clock stand still when a bag is paused or turned back
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        known, knowing = {"group": self._known}, {"clock": steady, "callback_group": self._known}
        tf, latched = QoSProfile(depth=100), QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._listen(self._configured, _message("tf2_msgs", "TFMessage"), "/tf", self._on_tf, tf, **known)
        self._listen(
            self._configured, _message("tf2_msgs", "TFMessage"), "/tf_static", self._on_tf_static, latched, **known
        )
        for camera, (name, c) in enumerate(zip(s.cameras, s.camera, strict=True)):
            qos = self._image_qos()
            self._listen(
                self._configured, CameraInfo, c.info_topic, self._on_info, qos, camera, name, sensor=name, **known
            )
        self._configured.append(
            (self.destroy_service, self.create_service(Trigger, "~/reset_memory", self._on_reset_memory))
        )
        timer = self.create_timer(s.diagnostics_period, self._guarded(self._diagnose), **knowing)
        self._configured.append((self.destroy_timer, timer))
        beats = QoSProfile(
            depth=1,
            deadline=Duration(seconds=LEASE),
            liveliness=LivelinessPolicy.MANUAL_BY_TOPIC,
            liveliness_lease_duration=Duration(seconds=LEASE),
        )
        self._out_heartbeat = self.create_publisher(State, "~/heartbeat", beats)
        self._configured.append((self.destroy_publisher, self._out_heartbeat))
        timer = self.create_timer(BEAT, self._guarded(self._beat), **knowing)
        self._configured.append((self.destroy_timer, timer))
        self.get_logger().info(
            f"configured: {self._model.name} on {self._model.device}, {len(s.cameras)} cameras, "
            f"poses of TF kept by {self._transforms.source}"
        )
        if s.sync == "approximate":
            self.get_logger().info(
                f"sync: approximate, sets made by {matcher().source}: only complete ones, narrower than "
                f"{s.approximate_slop} s; while one camera is silent nothing is published"
            )
        if not self._model.trained:
            self.get_logger().warning(f"{self._model.name}: random weights, what is published means nothing")

    def _load(self) -> None:
        """The model, warm: what can fail for want of memory fails here, not at the first set."""
        s = self.settings
        gc.freeze()  # full collections that walk all of PyTorch while a compiler works hold the heart up for a second
        model = load(s.model, s.weights or None, device=_device(s.device))
        with _retold(self.get_logger()):
            model = built(model, s.backend, len(s.cameras), s.precision)
        stream = Stream(model, longest_gap=s.longest_gap)
        stream.warm_up(s.cameras)
        self._model, self._stream = model, stream

    def _activate(self) -> None:
        s = self.settings
        with self._spun():
            self._await_known(s.startup_wait)
            if self._stream is None:
                self._load()
        self._stream.forget()
        self._collector = _gatherer(s)
        self._watches = [Watch(s.frozen_after) for _ in s.cameras]
        self._mailbox = Mailbox()
        self._answered: float | None = None  # s, steady: when the latest set was
        sweeps = self._model.system.config.sweeps
        self._scans = Scans(s.lidar_topic, sweeps, 1.0 / s.lidar_rate, s.lidar_gap, s.clock_jump) if sweeps else None
        pipeline = Pipeline(
            s.cameras,
            [c.image_topic for c in s.camera],
            self._transforms,
            self._stream,
            self.health,
            s.fixed_frame,
            s.base_frame,
            s.tf_wait,
            s.min_cameras,
            self._say,
            self._scans,
        )
        self.failure, self._busy, self._lost, self._latest_set = None, None, 0, None
        self._worker = threading.Thread(target=self._work, args=(pipeline, self._mailbox), name="worker")
        for camera, (name, c) in enumerate(zip(s.cameras, s.camera, strict=True)):
            kind = CompressedImage if c.compressed else Image
            qos = self._image_qos()
            self._listen(self._activated, kind, c.image_topic, self._on_image, qos, camera, name, sensor=name)
        if self._scans is not None:
            qos = self._image_qos()
            self._listen(self._activated, PointCloud2, s.lidar_topic, self._on_cloud, qos, sensor=LIDAR)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._deadlines = self.create_timer(s.set_deadline / POLLS, self._guarded(self._poll), clock=steady)
        self._deadlines.cancel()
        self._activated.append((self.destroy_timer, self._deadlines))
        # what is there now stays: a full collection that walks all of PyTorch holds everything up for a set or two
        gc.collect()
        gc.freeze()
        self._worker.start()
        self.health.activate(self._tick())
        scans = "" if self._scans is None else f", for scans on {s.lidar_topic}"
        self.get_logger().info(f"active: waiting for images on {', '.join(c.image_topic for c in s.camera)}{scans}")

    def _await_known(self, seconds: float) -> None:
        """Until `min_cameras` cameras have their CameraInfo and transforms, at most `seconds` s; 0 asks for nothing.

        NotReady names what is not there.
        """
        until, missing = time.monotonic() + seconds, self._unknown() if seconds else []
        while missing and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))
            missing = self._unknown()
        if missing:
            raise NotReady(f"after {seconds:g} s still without {'; '.join(missing)}")

    @contextmanager
    def _spun(self) -> Iterator[None]:
        """A thread spins the node while the executor that runs a transition cannot: calibration, TF and the heartbeat
        go on, nothing else does, above all no other transition.

        What takes its time stays in the thread of the transition: a signal ends it there, and errors come from there.
        """
        ours, theirs, done = SingleThreadedExecutor(context=self.context), self.executor, threading.Event()

        def spin() -> None:
            try:
                while not done.is_set():
                    ours.spin_once(timeout_sec=0.1)
            except ExternalShutdownException:
                pass  # who waits for this thread hears of it, too

        # in a service's callback the group is held already
        others = self.default_callback_group
        entity = next(filter(None, (reference() for reference in others.entities)))
        held = others.beginning_execution(entity)
        ours.add_node(self)
        thread = threading.Thread(target=spin, name="heart")
        try:
            thread.start()
            yield
        finally:
            done.set()
            ours.wake()
            thread.join()
            if held:
                others.ending_execution(entity)
            ours.remove_node(self)
            ours.shutdown()
            if theirs is not None:
                theirs.add_node(self)

    def _unknown(self) -> list[str]:
        """What is missing before a set can be answered: a phrase a camera, or one for the car; none if nothing is."""
        s, missing = self.settings, []
        for known, c in zip(self._calibrations, s.camera, strict=True):
            if known is None:
                missing.append(f"CameraInfo on {c.info_topic}")
            elif not self._transforms.joined(s.base_frame, known.optical_frame):
                missing.append(f"a transform {s.base_frame} <- {known.optical_frame}")
        if len(s.cameras) - len(missing) >= s.min_cameras:
            missing = []
        if not self._transforms.joined(s.fixed_frame, s.base_frame):
            missing.append(f"a transform {s.fixed_frame} <- {s.base_frame}")
        return missing

    def _on_set_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        """Parameters are read at configure: a change that would change nothing is refused, with the way to do it."""
        if not self._configured or all(change.name == "use_sim_time" for change in changes):
            return SetParametersResult(successful=True)
        return SetParametersResult(successful=False, reason="read at configure: deactivate and cleanup first")

    def _stop(self, leaving: bool = False) -> None:
        """Ends the worker and the subscriptions to images; twice does no harm. `leaving`: the process ends."""
        if self.health is not None:
            self.health.active = False
        if self._worker is not None:
            self._mailbox.close()
            if self._worker.is_alive():
                self._worker.join(BEAT)
            if self._worker.is_alive():
                with nullcontext() if leaving else self._spun():
                    self._await_worker(self._worker, leaving)
            self._worker = None
        self._watches, self._mailbox = [], None  # they hold pictures
        self._destroy(self._activated)

    def _await_worker(self, worker: threading.Thread, leaving: bool) -> None:
        """Until it has ended, or has been at one set for STUCK s. A model that it makes anew is waited for besides,
        but not where the process ends."""
        until, said = time.monotonic() + STUCK, False
        while worker.is_alive():
            if self._renewing:
                if leaving:  # nothing is lost: what is kept of a model on disk is whole or not there
                    self.left = worker
                    return
                if not said:
                    self.get_logger().info("the worker makes the model anew: it is stopped when that is done")
                until, said = time.monotonic() + STUCK, True
            elif time.monotonic() > until:
                self.left = worker
                self._fail(f"the worker has been at one set for more than {STUCK:g} s and cannot be stopped")
                return
            worker.join(0.1)

    def _give_back(self) -> None:
        """Everything that configure and activate took."""
        self._stop()
        self._destroy(self._configured)
        self._reset()
        _free()

    def _destroy(self, things: list) -> None:
        for destroy, thing in things:
            destroy(thing)
        things.clear()

    def close(self) -> None:
        """Ends the worker before the process ends, in whatever state the node is."""
        self._stop(leaving=True)

    # ---- callbacks: they check, sort and leave; none of them decodes or thinks

    def _offer(self, kind, topic: str):
        qos, remapped = _qos(1, self.settings.reliable_output), self.resolve_topic_name(topic)
        events = PublisherEventCallbacks(incompatible_qos=self._guarded(self._on_unheard, remapped, qos))
        publisher = self.create_lifecycle_publisher(kind, topic, qos, event_callbacks=events)
        self._configured.append((self.destroy_lifecycle_publisher, publisher))
        return publisher

    def _listen(
        self,
        owner: list,
        kind,
        topic: str,
        callback: Callable,
        qos: QoSProfile,
        *arguments,
        sensor: str | None = None,
        group: MutuallyExclusiveCallbackGroup | None = None,
    ) -> None:
        remapped = self.resolve_topic_name(topic)
        if sensor is not None:
            self._sources[remapped] = sensor
        unfit = self._guarded(self._on_incompatible_qos, remapped, qos, sensor)
        events = SubscriptionEventCallbacks(incompatible_qos=unfit)
        subscription = self.create_subscription(
            kind, topic, self._guarded(callback, *arguments), qos, callback_group=group, event_callbacks=events
        )
        owner.append((self.destroy_subscription, subscription))

    def _guarded(self, callback: Callable, *arguments) -> Callable:
        """A callback that cannot take the node with it: what it throws is counted and said."""

        def call(*message):
            try:
                callback(*message, *arguments)
            except Exception as error:
                self.health.count("exceptions in callbacks")
                self._say(f"callback {callback.__name__}", f"{callback.__name__}: {type(error).__name__}: {error}")

        return call

    def _image_qos(self) -> QoSProfile:
        return _qos(self.settings.image_depth, self.settings.reliable_images)

    def _on_image(self, message: Image | CompressedImage, camera: int, name: str) -> None:
        settings, now = self.settings.camera[camera], self._tick()
        known = self._calibrations[camera]
        try:
            if known is None:
                raise Refused("no CameraInfo", f"no usable CameraInfo on {settings.info_topic} yet")
            if (frame := message.header.frame_id.lstrip("/")) not in ("", known.optical_frame):
                raise Refused(
                    "foreign CameraInfo", f"frame {frame!r}, but {settings.info_topic} is of {known.optical_frame!r}"
                )
            picture = convert.compressed_picture(message) if settings.compressed else convert.raw_picture(message)
            if (picture.height, picture.width) != (known.height, known.width):
                raise Refused(
                    "wrong size",
                    f"{picture.width} x {picture.height} pixels, but {settings.info_topic} says "
                    f"{known.width} x {known.height}",
                )
            stamp = convert.nanoseconds(message.header.stamp)
            clock = self.get_clock().now().nanoseconds
            if (fault := self._watches[camera].fault(stamp, picture.data, now, clock)) is not None:
                raise Refused(*fault)
        except Refused as refused:
            self._refuse(name, settings.image_topic, refused)
            return
        self.health.image(name, now, stamp)
        lap = self._collector.lap
        replayed = clock / NANO if self.get_clock().ros_time_is_active else None
        sets = self._collector.add(camera, stamp, Shot(picture, known), now, replayed)
        if self._collector.lap != lap:
            self._transforms.turned_back(stamp)
            self._latest_set = None  # of the lap before: TF has no age beside it
            self.health.count("clock jumps")
            self._say("lap", "stamps went back: open sets and memory are forgotten, a new lap begins")
        self._post(sets, now)
        if self._collector.waiting and self._deadlines.is_canceled():
            self._deadlines.reset()

    def _on_incompatible_qos(self, event, topic: str, ours: QoSProfile, sensor: str | None) -> None:
        """A publisher that DDS does not connect to us: without a word, its topic would be silent for ever."""
        policy = qos_policy_name_from_kind(event.last_policy_kind).lower()
        theirs = _offers(self.get_publishers_info_by_topic(topic), policy)
        hint = ", or `reliable_images`" if sensor is not None and policy == "reliability" else ""
        sentence = (
            f"{topic}: a publisher offers {policy} {theirs}, we ask for {_word(getattr(ours, policy, None))}: "
            f"nothing of it will come; change its QoS{hint}"
        )
        self.health.explain("sets" if sensor is None else sensor, sentence)
        self._say(f"{topic} QoS", sentence)

    def _on_unheard(self, event, topic: str, ours: QoSProfile) -> None:
        """A subscriber that DDS does not connect to us."""
        policy = qos_policy_name_from_kind(event.last_policy_kind).lower()
        theirs = _offers(self.get_subscriptions_info_by_topic(topic), policy)
        hint = ", or `reliable_output`" if policy == "reliability" else ""
        self._say(
            f"{topic} QoS",
            f"{topic}: a subscriber asks for {policy} {theirs}, we offer {_word(getattr(ours, policy, None))}: "
            f"nothing will reach it; change its QoS{hint}",
        )

    def _on_cloud(self, message: PointCloud2) -> None:
        now = self._tick()
        try:
            self._scans.add(convert.cloud(message))
        except Refused as refused:
            self._refuse(LIDAR, self._scans.topic, refused)
            return
        self.health.image(LIDAR, now, convert.nanoseconds(message.header.stamp))

    def _on_info(self, message: CameraInfo, camera: int, name: str) -> None:
        settings, told = self.settings.camera[camera], convert.told(message)
        before = self._infos[camera]
        if before is None or before[0] != told:  # drivers repeat it with each image
            try:
                known = convert.calibration(message, settings.rectified)
            except Refused as refused:
                known = refused
            self._infos[camera] = told, known
            if before is not None:
                self._say(f"{name} CameraInfo", f"{settings.info_topic} changed: it was {before[1]}; it is {known}")
        known = self._infos[camera][1]
        if isinstance(known, Refused):
            self._calibrations[camera] = None  # what came last does not hold: better no camera than a wrong one
            self._refuse(name, settings.info_topic, known)
        else:
            self._calibrations[camera] = known

    def _on_tf(self, message) -> None:
        self._take_transforms(message, static=False)

    def _on_tf_static(self, message) -> None:
        self._take_transforms(message, static=True)

    def _take_transforms(self, message, static: bool) -> None:
        for stamped in message.transforms:
            try:
                self._transforms.add(*convert.transform(stamped), static)
            except ValueError as refused:
                self.health.count("transforms refused")
                self._say("tf", f"{'/tf_static' if static else '/tf'}: {refused}")

    def _on_reset_memory(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Sets that wait are dropped; the next one is of a new lap, at which the worker's stream forgets."""
        if self._worker is None:
            response.message = "the node is not active and remembers nothing: activate begins without memory"
            return response
        waiting = self._collector.poll(math.inf)
        letter = self._mailbox.put(None)
        for _ in range(len(waiting) + (letter is not None)):
            self.health.dropped("sets", "memory reset")
        self._collector.clear("memory reset")
        self.health.count("memory resets")
        self.get_logger().info("memory reset: somebody asked for it")
        response.success, response.message = True, "the next set is answered without memory of those before it"
        return response

    def _poll(self) -> None:
        now = time.monotonic()
        self._post(self._collector.poll(now), now)
        if not self._collector.waiting:  # every wake-up of the executor costs, and most sets complete by themselves
            self._deadlines.cancel()

    def _post(self, sets: list[ImageSet], now: float) -> None:
        for images in sets:
            self._latest_set = images.stamp
            self.health.count("sets complete" if images.complete else "sets partial")
            if self._mailbox.put(Letter(images, now)) is not None:
                self.health.count("sets skipped")

    def _diagnose(self) -> None:
        if self.failure is not None and self.state == "active":
            self.trigger_deactivate()
        if self._collector is not None:
            self.health.collected(self._collector.dropped)
        for what, value in self._facts().items():
            self.health.tell(what, value)
        publishers = {topic: self.count_publishers(topic) for topic in self._sources}
        for sensor in {*self._sources.values()}:
            several = [f"{n} publishers on {t}" for t, n in publishers.items() if n > 1 and self._sources[t] == sensor]
            self.health.doubted(sensor, ", ".join(several))
        name = self.get_fully_qualified_name()
        same = sum(f"{space.rstrip('/')}/{node}" == name for node, space in self.get_node_names_and_namespaces())
        sentence = f"{same} nodes are named {name}: what they say is mixed" if same > 1 else ""
        if self.health.doubted("name", sentence):
            self._say("name", sentence)
        report = self.health.report(self._tick())
        stamp = self.get_clock().now().nanoseconds
        self._out_diagnostics.publish(convert.diagnostics(stamp, name, report))

    def _beat(self) -> None:
        """Alive: the executor, since it came here, and the worker. The message is the node's lifecycle state.

        While a transition takes its time the executor is the one of `_spun`, and the state is the transition's.
        """
        busy, worker = self._busy, self._worker
        if worker is not None and worker.ident is not None and not worker.is_alive():
            return  # it failed; whoever spins this node acts on `failure`
        if busy is not None and time.monotonic() - busy > STUCK:
            self._say("stuck", f"the worker has been at one set for {time.monotonic() - busy:.0f} s: no heartbeat")
            return
        number, label = self._state_machine.current_state
        self._out_heartbeat.publish(State(id=number, label=label))

    def _facts(self) -> dict[str, object]:
        """What is asked anew for each message on /diagnostics."""
        facts: dict[str, object] = {}
        if (resident := resident_mb()) is not None:
            facts["resident memory MB"] = resident
        model = self._model  # None while the node rests, or makes it anew
        if model is not None and (device := model.device).type == "cuda":
            facts["CUDA memory MB"] = round(torch.cuda.memory_allocated(device) / 1e6, 1)
            facts["CUDA memory reserved MB"] = round(torch.cuda.memory_reserved(device) / 1e6, 1)
        facts["TF age s"] = self._transform_age()
        facts["lap"] = "none" if self._collector is None else self._collector.lap
        return facts

    def _transform_age(self) -> float | str:
        """s that TF is behind the newest set; below zero it is ahead, as it should be. "none" where there is none, or
        where /clock was turned back and one of the two is still of the lap before."""
        newest, latest = self._transforms.newest(self.settings.fixed_frame, self.settings.base_frame), self._latest_set
        if newest is None or latest is None:
            return "none"
        clock = self.get_clock()
        now = clock.now().nanoseconds if clock.ros_time_is_active else 0  # 0 too while there is no /clock
        if now and max(newest, latest) > now + self.settings.clock_jump * NANO:
            return "none"
        return round((latest - newest) / NANO, 3)

    def _tick(self) -> float:
        """The steady clock, s; `health` is told what /clock says beside it."""
        now, clock = time.monotonic(), self.get_clock()
        self.health.clock(now, clock.now().nanoseconds / NANO if clock.ros_time_is_active else None)
        return now

    def _refuse(self, camera: str, topic: str, refused: Refused) -> None:
        sentence = f"{topic}: refused: {refused}"
        self.health.refused(camera, time.monotonic(), refused.reason, sentence)
        self._say(f"{camera} {refused.reason}", sentence)

    def _say(self, key: str, sentence: str) -> None:
        """A warning, at most every five seconds for a key."""
        if self.health.may_say(key, time.monotonic()):
            self.get_logger().warning(sentence)

    # ---- the worker

    def _work(self, pipeline: Pipeline, mailbox: Mailbox) -> None:
        try:
            while self.failure is None and (letter := mailbox.take()) is not None:
                self._busy = time.monotonic()
                try:
                    self._answer(pipeline, letter)
                finally:
                    self._busy = None
        finally:
            pipeline.close()

    def _answer(self, pipeline: Pipeline, letter: Letter) -> None:
        if self.settings.lazy and not self._listened():
            self.health.idle(time.monotonic())
            return
        problem = self._try(pipeline, letter)
        if problem is None:
            self._lost = 0
            return
        kind, sentence, memory = problem
        if memory:
            self.health.count("out of memory")
            self._say("out of memory", f"out of memory ({sentence}): the model is made anew, its memory forgotten")
            if self._renewed(pipeline) and (again := self._try(pipeline, letter)) is not None:
                self._fail(f"a set was lost twice, also with a new model: {again[1]}, after: {sentence}")
            return
        self._lost += 1
        if self._lost == LOST and self._renewed(pipeline):
            self._say("renewed", f"{LOST} sets were lost in a row: the model was made anew")
        elif self._lost >= 2 * LOST:
            self._fail(f"{self._lost} sets were lost in a row, the latest by {kind}: {sentence}")

    def _try(self, pipeline: Pipeline, letter: Letter) -> tuple[str, str, bool] | None:
        """Answers a set. What went wrong, if it did: kind and text of the error, and whether memory did not suffice.

        Not the error itself: it holds all that its frames hold, and that must go before anything is made anew.
        """
        begin = time.perf_counter()
        try:
            served = pipeline.serve(letter.images)
            if served is not None:
                self._publish(served)
                self.health.took("total", time.perf_counter() - begin)
                self._served(served, letter)
            return None
        except Exception as error:
            self.health.dropped("sets", type(error).__name__, str(error))
            self._say("worker", f"a set was lost: {type(error).__name__}: {error}")
            return type(error).__name__, str(error), _out_of_memory(error)

    def _renewed(self, pipeline: Pipeline) -> bool:
        """Makes the model anew in a memory that is free of the old one; a node that cannot has failed."""
        self._busy, self._renewing = None, True  # loading may take longer than any set
        self._model = self._stream = pipeline.stream = None
        _free()
        try:
            self._load()
        except Exception as error:
            self._fail(f"the model could not be made anew: {error}")
            return False
        finally:
            self._renewing = False
        pipeline.stream, self._busy = self._stream, time.monotonic()
        return True

    def _fail(self, sentence: str) -> None:
        self.failure = sentence
        self.health.fail(sentence)
        self.get_logger().error(sentence)

    def _listened(self) -> bool:
        return any(p.get_subscription_count() for p in (self._out, self._out_points, self._out_markers))

    def _used(self, images: ImageSet) -> list[str]:
        """The sensors of a set, as `health` calls them; without a scan no set is served, where there is a LiDAR."""
        used = [name for name, shot in zip(self.settings.cameras, images.pictures, strict=True) if shot is not None]
        return used if self._scans is None else [*used, LIDAR]

    def _served(self, served: Served, letter: Letter) -> None:
        now = time.monotonic()
        self.health.took("latency", now - letter.arrived)
        self.health.served(now, self._used(served.images))
        self._publish_times(served.images.stamp, now)

    def _publish_times(self, stamp: int, now: float) -> None:
        """The times of this set, those that somebody listens to."""
        seconds = {f"processing_time/{stage}": value for stage, value in self.health.latest().items()}
        seconds["pipeline_latency"] = (self.get_clock().now().nanoseconds - stamp) / NANO
        if self._answered is not None:
            seconds["cyclic_time"] = now - self._answered
        self._answered = now
        for name, publisher in self._out_times.items():
            if name in seconds and publisher.get_subscription_count():
                publisher.publish(convert.milliseconds(publisher.msg_type, seconds[name], stamp))

    def _publish(self, served: Served) -> None:
        s, images, prediction = self.settings, served.images, served.prediction
        begin = time.perf_counter()
        message = convert.voxel_flow(
            prediction, images.stamp, s.base_frame, s.cameras, images.stamps, self._model.name, s.moving_speed
        )
        converted = time.perf_counter()
        self._out.publish(message)
        if self._out_points.get_subscription_count():
            self._out_points.publish(convert.points(prediction, message.header))
        if self._out_markers.get_subscription_count():
            self._out_markers.publish(convert.markers(prediction, message.header, s.moving_speed))
        self.health.took("convert", converted - begin)
        self.health.took("publish", time.perf_counter() - converted)


def _offers(endpoints, policy: str) -> str:
    return " or ".join(sorted({_word(getattr(e.qos_profile, policy, None)) for e in endpoints}))


def _word(value) -> str:
    return getattr(value, "name", str(value))


def _qos(depth: int, reliable: bool) -> QoSProfile:
    kind = ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT
    return QoSProfile(depth=depth, reliability=kind)


class _Retold(logging.Handler):
    """Says in a node's log what the library says."""

    def __init__(self, logger):
        super().__init__(logging.INFO)
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        sentence = record.getMessage()
        if record.levelno >= logging.WARNING:
            self._logger.warning(sentence)
        else:
            self._logger.info(sentence)


@contextmanager
def _retold(logger) -> Iterator[None]:
    """While engines are built or found: which, for how long, and why one that was there did not do."""
    library, handler = logging.getLogger("occflow"), _Retold(logger)
    before = library.level
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    try:
        yield
    finally:
        library.setLevel(before)
        library.removeHandler(handler)


def _free() -> None:
    """Gives memory that nobody holds back to the device: other processes share it."""
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _out_of_memory(error: Exception) -> bool:
    # PyTorch has a class of its own for its GPU allocator only; the CPU's, CUDA's and its libraries' have words
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(word in text for word in words)


def _gatherer(s: Settings) -> Gatherer:
    """Who puts images into sets, by the parameter `sync`."""
    offsets = [c.offset for c in s.camera]
    if s.sync == "approximate":
        return Approximate(len(s.cameras), s.approximate_queue, s.approximate_slop, offsets, s.clock_jump)
    return Collector(
        len(s.cameras), 1.0 / s.camera_rate, offsets, s.set_deadline, s.set_tolerance, s.min_cameras, s.clock_jump
    )


def _device(name: str) -> str:
    """The device of the parameter's word. ParameterProblem where it is not here: no silent fall to the CPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    here = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()) or int(number or 0) >= here:
        devices = torch.cuda.device_count()
        raise ParameterProblem(
            f"device: {name!r} is not here; auto, cpu or cuda:N (this machine has {devices} of cuda)"
        )
    return name


def _message(package: str, name: str):
    """A message class of a package that may be missing: SystemExit says so in one sentence."""
    try:
        return getattr(__import__(f"{package}.msg", fromlist=[name]), name)
    except ImportError:
        how = {
            "occflow_msgs": "build it: colcon build --base-paths src/occflow src/occflow/msg",
            "tf2_msgs": "install it: apt install ros-$ROS_DISTRO-tf2-msgs",
        }[package]
        raise SystemExit(f"occflow: the message package {package} is not on this path; {how}") from None


def _start(node: OccupancyNode, executor: SingleThreadedExecutor) -> int:
    """configure and activate, the latter again and again while all that is missing may still come; an exit code."""
    if node.trigger_configure() != TransitionCallbackReturn.SUCCESS:
        return 1
    while node.state == "inactive" and node.trigger_activate() != TransitionCallbackReturn.SUCCESS:
        if not node.waiting:
            return 1
        again = time.monotonic() + RETRY
        while (left := again - time.monotonic()) > 0:
            executor.spin_once(timeout_sec=min(left, 0.2))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """`ros2 run occflow_ros node`. Exit code 0 after SIGINT or SIGTERM, 1 when it cannot start."""
    _message("occflow_msgs", "VoxelFlow"), _message("tf2_msgs", "TFMessage")
    # a launch system's stop is an ordinary stop; SIGINT too is set, since shells start background jobs deaf to it
    for word in (signal.SIGINT, signal.SIGTERM):
        signal.signal(word, signal.default_int_handler)
    node, executor, code = None, None, 0
    try:
        # our own handling of signals: rclpy's would close the context under a worker that is still publishing
        rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
        node = OccupancyNode()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        if node.get_parameter("autostart").value:
            code = _start(node, executor)
        while code == 0 and rclpy.ok():
            executor.spin_once(timeout_sec=0.2)  # bounded: Python sees a signal only between two waits
            if node.failure is not None:  # with a last word on /diagnostics; who respawns it gets a node that is well
                node._diagnose()
                code = 1
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except (ParameterProblem, RuntimeError, ValueError) as problem:
        print(f"occflow: {str(problem).split(', at /')[0].strip()}", file=sys.stderr)  # rcl adds its source lines
        code = 1
    finally:
        # a launch system and a terminal may both say stop: the second word must not tear what the first one closes
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if node is not None:
            node.close()
        if executor is not None:
            executor.shutdown()
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
        if node is not None and node.left is not None:
            os._exit(1 if node.failure is not None else code)  # Python would wait for its thread for ever
    return code


if __name__ == "__main__":
    sys.exit(main())
