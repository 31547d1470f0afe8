"""A real RTSP server for tests: GStreamer's, with a live test picture.

Run by the system's Python, which has the ``gi`` bindings::

    /usr/bin/python3 tests/fakes/rtsp_server.py --port 0 --codec h265 --auth digest

Prints ``READY <port>`` when it listens. User and password come from the environment
(``RTSP_USER``, ``RTSP_PASSWORD``). Ends when its standard input is closed, so that a
test that dies leaves nothing behind.
"""

import argparse
import os
import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtsp, GstRtspServer  # noqa: E402

ENCODERS = {
    "h264": "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=15 bitrate=800 threads=1"
    " ! h264parse ! rtph264pay name=pay0 pt=96 config-interval=1",
    "h265": "x265enc tune=zerolatency speed-preset=ultrafast key-int-max=15 bitrate=800"
    " ! h265parse ! rtph265pay name=pay0 pt=96 config-interval=1",
    "mjpeg": "jpegenc ! rtpjpegpay name=pay0 pt=26",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", default="0")
    parser.add_argument("--codec", choices=sorted(ENCODERS), default="h264")
    parser.add_argument("--auth", choices=("none", "basic", "digest"), default="none")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--height", type=int, default=240)
    parser.add_argument("--fps", type=int, default=15)
    arguments = parser.parse_args()

    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(arguments.port)

    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(
        "( videotestsrc is-live=true pattern=ball ! video/x-raw,format=I420,"
        f"width={arguments.width},height={arguments.height},framerate={arguments.fps}/1 ! "
        f"{ENCODERS[arguments.codec]} )"
    )
    factory.set_shared(True)

    if arguments.auth != "none":
        user, password = os.environ["RTSP_USER"], os.environ["RTSP_PASSWORD"]
        token = GstRtspServer.RTSPToken()
        token.set_string(GstRtspServer.RTSP_TOKEN_MEDIA_FACTORY_ROLE, "viewer")
        auth = GstRtspServer.RTSPAuth()
        if arguments.auth == "basic":
            basic = GstRtspServer.RTSPAuth.make_basic(user, password)
            auth.add_basic(basic, token)
        else:
            auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
            auth.add_digest(user, password, token)
        server.set_auth(auth)
        permissions = GstRtspServer.RTSPPermissions()
        permissions.add_permission_for_role("viewer", "media.factory.access", True)
        permissions.add_permission_for_role("viewer", "media.factory.construct", True)
        factory.set_permissions(permissions)

    server.get_mount_points().add_factory("/live", factory)
    if server.attach(None) == 0:
        sys.exit("the port is in use")
    loop = GLib.MainLoop()
    # End of file on standard input: the test has gone.
    GLib.io_add_watch(
        sys.stdin, GLib.PRIORITY_DEFAULT, GLib.IO_HUP | GLib.IO_IN, lambda *_: loop.quit()
    )
    print(f"READY {server.get_bound_port()}", flush=True)
    loop.run()


if __name__ == "__main__":
    main()
