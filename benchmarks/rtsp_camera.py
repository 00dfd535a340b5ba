"""A camera of its own: an RTSP server (RFC 2326, RTP over TCP) that sends JPEG frames (RFC 2435).

    python benchmarks/rtsp_camera.py --port 8554 --rate 25 --size 640x480

Frames are gray, each with the brightness of its number modulo 256. Several sizes take turns, 25 frames each, within one
stream. The port is printed once the server listens; 0 takes a free one.
"""

from __future__ import annotations

import argparse
import io
import itertools
import socketserver
import struct
import time

import numpy as np
from PIL import Image

FRAGMENT = 1400  # bytes of JPEG data in a packet
TURN = 25  # frames of a size


def jpeg_parts(size: tuple[int, int], value: int) -> tuple[bytes, bytes]:
    """The two quantization tables (128 bytes) and the entropy-coded data of a gray 4:2:0 JPEG."""
    stream = io.BytesIO()
    pixels = np.full((size[1], size[0], 3), value, np.uint8)
    pixels[size[1] // 4 : size[1] // 2, size[0] // 4 : size[0] // 2] = 255 - value
    Image.fromarray(pixels).save(stream, "JPEG", quality=75, subsampling="4:2:0")
    content, tables, position = stream.getvalue(), b"", 2
    while content[position + 1] != 0xDA:  # start of scan
        length = int.from_bytes(content[position + 2 : position + 4], "big")
        if content[position + 1] == 0xDB:  # quantization tables of 1 + 64 bytes each
            segment = content[position + 4 : position + 2 + length]
            tables += b"".join(segment[start + 1 : start + 65] for start in range(0, len(segment), 65))
        position += 2 + length
    length = int.from_bytes(content[position + 2 : position + 4], "big")
    return tables, content[position + 2 + length : -2]


def packets(number: int, size: tuple[int, int], parts: tuple[bytes, bytes], stamp: int) -> list[bytes]:
    """The RTP packets of a frame, numbered from ``number``, in the frames of RTSP's interleaving (channel 0)."""
    tables, scan = parts
    result = []
    for offset in range(0, len(scan), FRAGMENT):
        # Type 1 is 4:2:0; Q 255 says that the tables are in the first packet of every frame.
        header = struct.pack("!B3sBBBB", 0, offset.to_bytes(3, "big"), 1, 255, size[0] // 8, size[1] // 8)
        if offset == 0:
            header += struct.pack("!BBH", 0, 0, len(tables)) + tables
        last = offset + FRAGMENT >= len(scan)
        rtp = struct.pack("!BBHII", 0x80, 26 | (last << 7), (number + len(result)) & 0xFFFF, stamp & 0xFFFFFFFF, 1)
        packet = rtp + header + scan[offset : offset + FRAGMENT]
        result.append(struct.pack("!cBH", b"$", 0, len(packet)) + packet)
    return result


class Session(socketserver.StreamRequestHandler):
    """One client, from OPTIONS to the end of its connection."""

    rate: float
    sizes: tuple[tuple[int, int], ...]
    frames: dict[tuple[tuple[int, int], int], tuple[bytes, bytes]]

    def handle(self) -> None:
        """Answer until PLAY, and then send."""
        while request := self.read_request():
            method, url, sequence = request
            answers = {
                "OPTIONS": "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n",
                "SETUP": "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n",
                "PLAY": "Session: 1\r\nRange: npt=0-\r\n",
            }
            body = ""
            if method == "DESCRIBE":
                body = "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\n"
                body += "m=video 0 RTP/AVP 26\r\na=control:track\r\n"
                answers[method] = (
                    f"Content-Base: {url}/\r\nContent-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
                )
            head = f"RTSP/1.0 200 OK\r\nCSeq: {sequence}\r\n{answers.get(method, '')}\r\n"
            self.wfile.write((head + body).encode())
            if method == "PLAY":
                self.play()
                return

    def read_request(self) -> tuple[str, str, str] | None:
        """Method, URL and sequence number; None at the end of the connection."""
        lines = []
        while line := self.rfile.readline().strip():
            lines.append(line.decode(errors="replace"))
        if not lines:
            return None
        method, url, *_ = lines[0].split()
        sequence = next(value for name, _, value in (item.partition(":") for item in lines) if name == "CSeq")
        return method, url.rstrip("/"), sequence.strip()

    def play(self) -> None:
        """Send frames until the client is gone."""
        number, begin = 0, time.monotonic()
        try:
            for count in itertools.count():
                size = self.sizes[count // TURN % len(self.sizes)]
                stamp = int(90_000 * count / self.rate)
                sent = packets(number, size, self.frames[size, count % 256], stamp)
                self.wfile.write(b"".join(sent))
                number += len(sent)
                time.sleep(max(0.0, begin + count / self.rate - time.monotonic()))
        except OSError:
            return


class Server(socketserver.ThreadingTCPServer):
    """A thread for each client."""

    allow_reuse_address = True
    daemon_threads = True


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float, default=25.0, help="frames a second")
    parser.add_argument("--size", action="append", help="such as 640x480, multiples of 8; repeatable")
    options = parser.parse_args()
    sizes = tuple(tuple(map(int, size.split("x"))) for size in options.size or ["640x480"])
    frames = {(size, value): jpeg_parts(size, value) for size in sizes for value in range(256)}
    handler = type("Camera", (Session,), {"rate": options.rate, "sizes": sizes, "frames": frames})
    with Server(("127.0.0.1", options.port), handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
