"""Every bound of the server in one file, with the relations between them asserted.

These are hard ceilings of the code: how many, how large, how much of a peer's data is kept.
``config.Limits`` chooses values below them. How long something may take stands where it is waited
for, or in the config.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# -- the wire ---------------------------------------------------------------------
MAX_MESSAGE_BYTES: Final = 33 * MIB
"""gRPC refuses larger messages before they are parsed. Above ``MAX_PICTURE_BYTES``
so that a picture slightly too large gets our own error, which can say so."""
MAX_PLAIN_MESSAGE_BYTES: Final = 256 * KIB
"""Of a message that holds no picture: a subject with all its labels has 20 KiB, a stream's config
with all its zones and lines 40."""
MAX_NAME_BYTES: Final = 4 * KIB
"""Of a message to gRPC's own services (health, reflection): a name. Those who watch health are
many, and what they have asked for is kept as long."""
MAX_PICTURE_BYTES: Final = 32 * MIB
"""A raw 3840x2160 BGR picture is 24.9 MB."""
MAX_PIXELS: Final = 51_000_000
"""Ceiling for a decoded picture: 153 MB as BGR, once per worker. Telephones' 50 megapixels are
8192x6144."""
MAX_SHRUNK_PIXELS: Final = 65_000_000
"""Ceiling for a JPEG of one scan, of which a fraction is decoded: 64 megapixels, 9248x6936."""
MAX_SHRINK: Final = 8
"""How far a JPEG can be scaled down while it is decoded: to the mean of each block."""
MIN_SIDE: Final = 16
"""Smaller pictures cannot hold a face."""
MAX_SIDE: Final = 16_384

MAX_PICTURE_SCANS: Final = 64
"""Scans of a JPEG; each goes over its whole plane again. Encoders write up to 12."""
MAX_PICTURE_SAMPLES: Final = 800_000_000
"""Samples that a JPEG's scans go over, counted again in each: 50 megapixels without chroma
subsampling in the ten scans of libjpeg's own script are 700 million."""
MAX_PICTURE_SEGMENTS: Final = 4_096
"""Segments of a JPEG. A profile or a preview of 32 MiB takes 512."""
MAX_PICTURE_STRAYS: Final = 256
"""Places between a JPEG's segments where bytes lie that belong to none."""
MAX_PICTURE_CHUNKS: Final = 16_384
"""Chunks of a PNG. Encoders write IDATs of 8 KiB or more: 4,096 for a picture of 32 MiB."""
MAX_PICTURE_EXTRAS: Final = 4 * MIB
"""Of a PNG or WebP besides its pixels: profiles, texts, previews."""
MAX_PNG_BYTES: Final = 208_000_000
"""A PNG's rows, inflated: 50 megapixels with alpha."""
DECODE_SECONDS: Final = 2.0
"""What one picture may take once it is found worth decoding; a job_timeout_ms under 5,000
lowers it to two fifths of that. More than the slowest picture within the bounds above."""
MAX_ABANDONED_DECODERS: Final = 2
"""Decodings given up that still run; with one more the worker answers and ends."""

# -- video ------------------------------------------------------------------------
MAX_VIDEO_PIXELS: Final = 9_437_184
"""Of one picture: the largest of H.264's level 5.2, 36,864 macroblocks; 4096x2304."""
MAX_REFERENCES: Final = 16
"""Pictures that a decoder keeps; no level allows more."""
MAX_KEPT: Final = 53_477_376
"""Pixels of all of those: 6 of H.265's level 5.2 (H.264's allows 47 million). 80 MB of 8 bits."""
MAX_REORDER: Final = 16
"""Pictures that are held back to be shown in order."""
MAX_NAL_UNITS: Final = 1_024
"""Of one access unit; level 5.2 allows 600 slices."""
MAX_PARAMETER_SET_BYTES: Final = 4 * KIB
MAX_PARAMETER_SETS: Final = 8
"""Of sequences, of one access unit: they are read bit by bit, beside everybody else's frames.
Encoders send one, or one for each layer."""
MAX_GROUP_UNITS: Final = 2_048
"""Access units kept since a key frame: 80 s at 25 a second."""
MAX_VIDEO_CACHE: Final = 32 * MIB
"""Bytes of access units kept since a key frame; they fit into one job."""
MAX_DECODER_THREADS: Final = 2
"""Of one decoder on a CPU."""
MAX_DECODERS: Final = 64
"""Of video, of one worker; with more lanes of video the pool needs more workers."""

# -- shards -----------------------------------------------------------------------
MAX_SHARDS: Final = 64
"""Processes of one server."""
MAX_LINK_MESSAGE_BYTES: Final = 16 * MIB
"""What a shard and its keeper say at a time: metrics are the longest."""
MAX_LINK_BACKLOG_BYTES: Final = 32 * MIB
"""What waits for one that does not read; with more it counts as hung."""
MAX_LINK_QUESTIONS: Final = 256
"""Of one shard to the others, under way at one time."""
MAX_SHARED_KEYS: Final = 512
"""Keys with calls under way, of one shard, that the others count too."""

# -- a stream ---------------------------------------------------------------------
MAX_STREAMS: Final = 4_096
MAX_WINDOW: Final = 256
"""Frames of one stream without an outcome written."""
MAX_FACES: Final = 64
"""Faces a picture."""
MAX_CANDIDATES: Final = 10
MAX_UNARY_CALLS: Final = 128
"""Single pictures (analysis, enrolment, identification) under way at one time."""
MAX_CALLS: Final = 256
"""Single calls of every kind under way at one time."""
MAX_RECEIVING: Final = 16
"""Requests of single calls that are being received; the others wait unread."""
OPERATORS_PART: Final = 8
"""One in so many places is kept for keys with the ``admin`` scope."""
MAX_PENDING_CALLS: Final = 256
"""Calls that wait to be looked at; beyond them some are refused, beyond twice as many all. Each
takes some 20 KiB of the front: a flood of calls that are reset at once fills this queue."""
MAX_STREAMS_PER_CONNECTION: Final = 100
"""HTTP/2 streams; further calls of a connection wait at its client."""
MAX_CONNECTIONS: Final = 4_096
RESERVED_DESCRIPTORS: Final = 256
"""Kept back from connections: workers that come back, files, the gallery."""
MAX_MEDIA_NS: Final = 1 << 62
"""Of a stream's media time, 146 years: with all that is counted from it, it is kept in 64 bits."""
MAX_KEPT_NS: Final = (1 << 63) - 1
"""Of a camera's clock, before or after 1970, in what is kept: the years 1678 to 2261."""
MAX_TRACKS: Final = 256
"""Tracks a lane; more than ``MAX_FACES`` because lost tracks linger for a while."""

MAX_CALIBRATION_TRACKS: Final = 100_000
"""Tracks that a calibration of liveness looks at, the newest ones."""
MAX_CALIBRATED_SOURCES: Final = 10_000
"""Sources that have liveness thresholds of their own."""
MAX_CALIBRATIONS_BYTES: Final = 8 * 1024 * 1024
"""Of the file that holds them."""
MAX_LIVENESS_SHOTS: Final = 8
"""Liveness scores that a track remembers."""
MAX_DOUBTS: Final = 64
"""Doubtful links that a track knows singly; of older ones it knows the first."""

# -- pools and workers --------------------------------------------------------------
MAX_WORKERS: Final = 64
MAX_BATCH: Final = 32
MAX_CANARIES: Final = 2
"""Pictures of the canary, each with a known answer."""
BATCH: Final = 8
"""Where nothing else is said."""
MAX_AHEAD: Final = 16
"""Lanes of video of which a job decodes what nobody looks at, beside its batch; both together are
at most ``MAX_BATCH``."""
MAX_AHEAD_UNITS: Final = 4
"""Access units of one such lane in a job; more go with its next picture."""
BEHIND_NS: Final = 100_000_000
"""So long after its first turn a stream's decoder may be at one picture; then the stream goes on
with its next key frame."""
JOBS_PER_WORKER: Final = 2
"""One computes, the next is staged: decoding and copies overlap with compute."""
JOBS_PER_DECODER: Final = 3
"""Of a worker whose card decodes video: what is in the third is decoded meanwhile."""
MAX_POOL_QUEUE: Final = 8_192
"""Tasks that wait in a pool. A lane holds at most its window, so this is met only by
thousands of streams; then the newest task is refused with POOL_OVERLOADED."""
MAX_KEY_QUEUE: Final = MAX_POOL_QUEUE // 2
"""Of those, tasks of one key."""
SPARED_KEY_QUEUE: Final = 256
"""Tasks of one key that wait whatever the others' number, up to twice ``MAX_POOL_QUEUE`` of all:
files fill their windows, and keep no other key's cameras out."""
MAX_TASK_ATTEMPTS: Final = 2
"""A task whose worker died is tried once more; then it is POISONED."""
BAD_PICTURES: Final = 3
"""Pictures of one stream, or single pictures of one key, that cost too much within
``BAD_PICTURES_S``; then all of them are refused for as long."""
BAD_PICTURES_OF_KEY: Final = 12
"""The same, of all streams and calls of a key: then streams of sources that have sent nothing else
are refused."""
MOST_BAD_PICTURES_OF_KEY: Final = 3 * BAD_PICTURES_OF_KEY
"""The same again: then all of them are refused."""
BAD_PICTURES_S: Final = 60
MAX_OFFENDERS: Final = 1_024
"""Streams, sources and keys whose bad pictures are remembered."""
MAX_PROVEN: Final = 2 * MAX_STREAMS
"""Streams, and sources, of which it is known that their pictures can be analysed."""
MAX_ACCUSERS: Final = 3
"""When pictures of so many different senders have ended workers within ``BAD_PICTURES_S``, it
is the worker that is to blame."""

MAX_WORKER_LINE_BYTES: Final = 8 * KIB
"""A line that a worker prints; longer ones are cut."""
MAX_WORKER_LINES_PER_S: Final = 200
MAX_WORKER_TRACEBACK_CHARS: Final = 6_000
"""Below ``MAX_WORKER_LINE_BYTES``, which it is sent in."""
MAX_ATTACHING: Final = 16
"""External workers that knock at the same time."""
MAX_DEVICES: Final = 64
MAX_DEVICE_PROCESSES: Final = 1_024
MAX_MANIFEST_BYTES: Final = 64 * KIB
MAX_WEIGHTS_BYTES: Final = 2 * KIB * MIB
MAX_PACKAGES: Final = 1_000
"""Folders looked at in one directory of packages."""

# -- between processes ----------------------------------------------------------------
MAX_PACKET_BYTES: Final = 192 * KIB
"""One SOCK_SEQPACKET message; the kernel's default send buffer is 208 KiB."""
MAX_DESCRIPTORS: Final = 2
"""Of one message: Load brings two arenas, GallerySnapshot a matrix and its table."""
MAX_CHANNEL_BACKLOG: Final = 64
"""Messages that a worker has not taken; it has a handful in flight, so more means it is stuck."""
REQUEST_SLOT_BYTES: Final = 40 * MIB
"""One job's input. Sparse: only touched pages take memory."""
RESPONSE_SLOT_BYTES: Final = 64 * MIB
"""One job's output: crops of every face, or embeddings. Sparse too."""
SLOT_KEEP_BYTES: Final = 8 * MIB
"""Pages of a slot that stay resident between jobs; those beyond are given back."""
FACE_FLOATS: Final = 15
"""Of a detected face: box (4), score (1), landmarks (10), float32."""
SIGNATURE_BYTES: Final = 260
"""What a face looks like, roughly (``worker.appearance``): no biometric template."""
FACE_RECORD_BYTES: Final = 4 * FACE_FLOATS + SIGNATURE_BYTES
"""A detected face in the response slot."""
MAX_ITEM_MESSAGE_BYTES: Final = 4 * KIB
"""One item of a job in a packet; faces, crops and embeddings lie in the slots."""
MAX_CROP_RECORD_BYTES: Final = 512 * KIB
"""All crops of one face."""
MAX_EMBEDDING_DIM: Final = 4_096

# -- the gallery --------------------------------------------------------------------
MAX_TEMPLATES: Final = 2_000_000
MAX_TEMPLATES_PER_SUBJECT: Final = 32
MAX_BASES_KEPT: Final = 3
"""Subject tables of older bases that results in flight may still refer to."""
MIN_DELTA_ROWS: Final = 1_024
MAX_DELTA_ROWS: Final = 16_384
DELTA_SHARE: Final = 8
"""A new base is made when so many rows were added or removed since the last one: one in
``DELTA_SHARE`` of its own, within these bounds. All of them are compared with each face."""
MAX_GALLERY_LOG_BYTES: Final = 2 * KIB * MIB
"""What was added and removed since a base. Each template is in it once, a base follows soon."""
MAX_PAGE_SIZE: Final = 1_000
MAX_LABELS: Final = 32
MAX_LABEL_KEY_BYTES: Final = 64
MAX_LABEL_VALUE_BYTES: Final = 512
MAX_ID_CHARS: Final = 128
MAX_DISPLAY_NAME_BYTES: Final = 256
MAX_SEEN_WAITING: Final = 65_536
"""Subjects of whom it is to be noted that they were seen, until it is."""
MAX_AUDIT_PENDING: Final = 10_000
"""Entries of the audit log that wait to be written, while the store is away."""
AUDIT_PRUNE_S: Final = 3600.0
"""Between two looks whether entries of the audit log are old enough to end."""
AUDIT_FLUSH_S: Final = 0.5
"""Look-ups and refusals reach the audit log within this time."""
RECHECK_S: Final = 30.0
"""Open calls are looked at again this often, whether or not anything has been told."""
MAX_METERED_TRACKS: Final = 1024
"""Tracks of a stream whose names are known to have been counted."""
START_POLL_S: Final = 0.2
"""Between two looks of a server that begins whether its pools can infer by now."""
ERASED_WITHIN_NS: Final = 300 * 1_000_000_000
"""By then the keys of the deleted are opened by none that is left, as receipts say; a large gallery
on a slow disk takes a while."""
ERASE_WITHIN_S: Final = 30.0
"""Between two looks whether what was deleted still has a key that would open it."""
RENEWAL_S: Final = 60
"""A chip that was kept waits so long for the recogniser, beside the cameras."""
GALLERY_WATCH_S: Final = 1.0
"""Between two looks whether the gallery's file is still where it was."""
MIN_DISK_BYTES: Final = 4 * MIB
"""Free space below which the gallery takes no changes."""
MAX_GALLERY_CALLS: Final = 1_024
"""Store calls that wait for the store's one thread; then GALLERY_UNAVAILABLE."""
MAX_REQUEST_IDS: Final = 10_000
"""Enrolments remembered for idempotency; the oldest are forgotten first."""

MAX_LOSSES: Final = 10_000
"""Subjects of whom it is known when they last lost a template; of older losses it is known that
they were, and no more whose."""
MAX_CHANGES_KEPT: Final = 100_000
"""Changes of the gallery that are kept for those who follow it; who is further behind takes all of
it in again."""
CHANGES_PRUNED_EVERY: Final = 1_024
MAX_CHANGE_BATCH: Final = 1_024
"""Changes that a reader takes in at a time."""

# -- events -------------------------------------------------------------------------
EVENT_HISTORY: Final = 4_096
"""Events that are kept. Watchers read from the history, each at its own pace; one that falls
out of it has lost events and is told so."""
MAX_EVENTS_WAITING: Final = 65_536
"""Events that wait for a store that is away; more are lost, and counted."""
MAX_EVENTS_PRUNED: Final = 10_000
"""Events that are forgotten in one transaction."""
MAX_EVENT_WATCHERS: Final = 64
MAX_HEALTH_WATCHERS: Final = 1_024
"""Calls that watch health: one of every connection of a client of several servers."""
MAX_EVENT_FILTERS: Final = 256
"""Sources and galleries that a watcher names."""
MAX_SEQUENCE: Final = (1 << 63) - 1
"""No event has a larger number: stores count in 64 bits with a sign, clients without."""
MAX_EVENT_BATCH: Final = 256
"""Events that a watcher is given at a time."""

# -- looking at streams -------------------------------------------------------------
MAX_TRACED_PER_S: Final = 1_000
"""Frames a second that may be traced at most: some eight spans each."""
MAX_TRACED_TASKS: Final = 64
"""Tasks of one frame that its trace shows: two for each of thirty faces, and the detector's."""
MAX_SPANS_WAITING: Final = 2_048
"""For a collector that is away or slow; then they are lost."""
MAX_VIEWERS: Final = 256
"""Looks at streams under way."""
MAX_VIEWED_BYTES: Final = 4 * MIB
"""Of access units that wait for one who looks; then the look goes on with the next key frame. A
still picture that is larger is not shown."""
MAX_VIEWED_UNITS: Final = 512
MAX_UNSEEN_BYTES: Final = 16 * MIB
"""Pictures of a stream that somebody looks at, kept until their outcomes are there."""
MAX_VIEW_FPS: Final = 60.0
VIEW_FPS: Final = 15.0
"""Where nothing else is asked for."""
VIEWED_OUTCOMES: Final = 256
"""Newest outcomes of a stream that its rates and ages are told from."""

# -- zones and lines ---------------------------------------------------------------------------
MAX_AREAS: Final = 32
"""Zones of one stream, and lines: each face of each picture is held against all of them."""
MAX_ZONE_POINTS: Final = 64
MAX_GHOSTS: Final = 64
"""Tracks of a stream that ended behind a line, and are remembered for some seconds."""

# -- pictures of events -------------------------------------------------------------
PORTRAIT_SIDE: Final = 224
"""Pixels of an event's picture: a face in it is 128 wide (``PORTRAIT_SCALE``)."""
PORTRAIT_SCALE: Final = 1.75
"""How many times the face's box it shows."""
MAX_ENCODED: Final = 2
"""Pictures that are encoded together: the aligned chip, and the one with its surroundings."""
MAX_PORTRAITS: Final = 512
"""Best shots of tracks in memory, in all streams that keep any: 97 MB."""
MAX_PICTURES_WAITING: Final = 256
"""Pictures of events that wait to be encoded and written; more are not kept, and counted."""
MAX_PICTURES_PRUNED: Final = 1_000
"""Pictures that retention ends in one transaction."""
PICTURE_S: Final = 10.0
"""How long a picture waits for a worker to encode it; and a caller for one that is on its way."""

# -- logs and metrics -----------------------------------------------------------------
MAX_METRICS_CONNECTIONS: Final = 8
MAX_METRICS_HEADER_BYTES: Final = 8 * KIB
MAX_LOG_LINES_PER_S: Final = 20
"""Of one event."""
MAX_LOG_EVENTS: Final = 256
"""Kinds of lines that are told apart within a second."""
MAX_LOG_VALUE_CHARS: Final = 2_000
MAX_TRACEBACK_CHARS: Final = 20_000
MAX_STATUS_CHARS: Final = 256
"""``systemctl status`` shows one line."""

assert MAX_PICTURE_BYTES < MAX_MESSAGE_BYTES, "a picture must fit into a message"
assert MAX_PICTURE_BYTES <= REQUEST_SLOT_BYTES, "a picture must fit into a slot"
assert MAX_VIDEO_CACHE <= REQUEST_SLOT_BYTES, "a group of pictures must fit into a slot"
assert MAX_BATCH * MAX_ITEM_MESSAGE_BYTES <= MAX_PACKET_BYTES, "a job's answer is one packet"
assert MAX_WORKER_TRACEBACK_CHARS < MAX_WORKER_LINE_BYTES
assert SLOT_KEEP_BYTES % 4096 == 0
assert FACE_RECORD_BYTES % 4 == 0, "records are read as float32"
assert MAX_FACES * MAX_CROP_RECORD_BYTES <= RESPONSE_SLOT_BYTES, "one picture's crops must fit"
assert MAX_BATCH * MAX_EMBEDDING_DIM * 4 <= RESPONSE_SLOT_BYTES
assert MAX_WINDOW * 8 <= MAX_KEY_QUEUE
assert BAD_PICTURES <= BAD_PICTURES_OF_KEY <= MOST_BAD_PICTURES_OF_KEY
assert MAX_TRACKS >= 2 * MAX_FACES
assert MAX_LINK_MESSAGE_BYTES <= MAX_LINK_BACKLOG_BYTES
