"""A small Google Cloud Storage: the XML API as obstore's `GCSStore` speaks it, objects in memory.

Listing, ranged GET with `generation` and `If-Match`, PUT, multipart upload, DELETE. With `keys` set,
only requests that bear a JWT signed by one of these service accounts' keys are served.
"""

from __future__ import annotations

import hashlib
import secrets
from base64 import urlsafe_b64decode
from dataclasses import dataclass, field
from email.utils import formatdate
from urllib.parse import quote, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from support.http_service import HttpService, Request, Response, serve_bytes


@dataclass(frozen=True, slots=True)
class GcsObject:
    data: bytes
    generation: int

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data).hexdigest()}"'

    def headers(self) -> dict[str, str]:
        return {
            "ETag": self.etag,
            "x-goog-generation": str(self.generation),
            "x-goog-metageneration": "1",
            "Last-Modified": formatdate(self.generation, usegmt=True),
            "Accept-Ranges": "bytes",
        }


@dataclass(slots=True)
class _Upload:
    key: str
    parts: dict[int, bytes] = field(default_factory=dict)


class FakeGcs(HttpService):
    """`objects` is {"bucket/key": GcsObject}; every write is a new generation."""

    def __init__(self, page: int = 3) -> None:
        super().__init__()
        self.objects: dict[str, GcsObject] = {}
        self.keys: list[RSAPublicKey] = []
        self._page = page
        self._generation = 1_700_000_000
        self._uploads: dict[str, _Upload] = {}

    def put(self, key: str, data: bytes) -> GcsObject:
        with self.lock:
            self._generation += 1
            self.objects[key] = GcsObject(data, self._generation)
            return self.objects[key]

    def answer(self, request: Request) -> Response:
        if self.keys and not self._signed(request.headers.get("authorization", "")):
            return _error(401, "AuthenticationRequired", "Authentication required.")
        name = unquote(request.path).lstrip("/")
        bucket, slash, key = name.partition("/")
        if not slash or not key:
            return self._list(bucket, request.query)
        if request.method in ("GET", "HEAD"):
            return self._get(name, request)
        if request.method == "PUT" and "uploadId" in request.query:
            return self._put_part(request)
        if request.method == "PUT":
            if request.headers.get("x-goog-if-generation-match") == "0" and name in self.objects:
                return _error(412, "PreconditionFailed", "The object exists.")
            stored = self.put(name, request.body)
            return Response(200, b"", stored.headers())
        if request.method == "POST":
            return self._post(bucket, key, name, request)
        if request.method == "DELETE":
            if "uploadId" in request.query:
                self._uploads.pop(request.query["uploadId"], None)
            else:
                self.objects.pop(name, None)
            return Response(204)
        return _error(405, "MethodNotAllowed", request.method)

    def _signed(self, authorization: str) -> bool:
        signed, _, signature = authorization.removeprefix("Bearer ").rpartition(".")
        for key in self.keys:
            try:
                key.verify(
                    urlsafe_b64decode(signature + "=="), signed.encode(), padding.PKCS1v15(), hashes.SHA256()
                )
            except InvalidSignature:
                continue
            return True
        return False

    def _list(self, bucket: str, query: dict[str, str]) -> Response:
        prefix = query.get("prefix", "")
        after = unquote(query.get("continuation-token") or query.get("start-after") or "")
        keys = sorted(k.partition("/")[2] for k in self.objects if k.startswith(f"{bucket}/{prefix}"))
        groups: dict[str, None] = {}
        plain: list[str] = []
        delimiter = query.get("delimiter")
        for key in keys:
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                groups[prefix + rest.partition(delimiter)[0] + delimiter] = None
            else:
                plain.append(key)
        left = [key for key in plain if key > after]
        page = left[: self._page]
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Generation>{o.generation}</Generation>"
            f"<LastModified>2026-01-02T03:04:05.678Z</LastModified>"
            f"<ETag>{escape(o.etag)}</ETag><Size>{len(o.data)}</Size></Contents>"
            for key in page
            for o in (self.objects[f"{bucket}/{key}"],)
        )
        more = len(left) > len(page)
        token = f"<NextContinuationToken>{escape(quote(page[-1]))}</NextContinuationToken>" if more else ""
        folders = "".join(f"<CommonPrefixes><Prefix>{escape(g)}</Prefix></CommonPrefixes>" for g in groups)
        return _xml(
            "<ListBucketResult xmlns='http://doc.s3.amazonaws.com/2006-03-01'>"
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{contents}{folders}</ListBucketResult>"
        )

    def _get(self, name: str, request: Request) -> Response:
        stored = self.objects.get(name)
        generation = request.query.get("generation")
        if stored is None or (generation is not None and generation != str(stored.generation)):
            return _error(404, "NoSuchKey", "The specified key does not exist.")
        if request.headers.get("if-match", stored.etag) not in (stored.etag, stored.etag.strip('"')):
            return _error(412, "PreconditionFailed", "At least one of the pre-conditions did not hold.")
        return serve_bytes(request, stored.data, stored.headers())

    def _put_part(self, request: Request) -> Response:
        upload = self._uploads.get(request.query["uploadId"])
        if upload is None:
            return _error(404, "NoSuchUpload", "The upload does not exist.")
        upload.parts[int(request.query["partNumber"])] = request.body
        return Response(200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    def _post(self, bucket: str, key: str, name: str, request: Request) -> Response:
        if "uploads" in request.query:
            upload_id = secrets.token_hex(8)
            self._uploads[upload_id] = _Upload(name)
            return _xml(
                f"<InitiateMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{escape(key)}</Key>"
                f"<UploadId>{upload_id}</UploadId></InitiateMultipartUploadResult>"
            )
        upload = self._uploads.pop(request.query["uploadId"], None)
        if upload is None:
            return _error(404, "NoSuchUpload", "The upload does not exist.")
        numbers = [
            int(e.text or "0")
            for e in ElementTree.fromstring(request.body).iter()
            if e.tag.endswith("PartNumber")
        ]
        stored = self.put(name, b"".join(upload.parts[number] for number in numbers))
        xml = _xml(
            f"<CompleteMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{escape(key)}</Key>"
            f"<ETag>{escape(stored.etag)}</ETag></CompleteMultipartUploadResult>"
        )
        return Response(xml.status, xml.body, {**xml.headers, "x-goog-generation": str(stored.generation)})


def _xml(text: str) -> Response:
    return Response(
        200, f"<?xml version='1.0' encoding='UTF-8'?>{text}".encode(), {"Content-Type": "application/xml"}
    )


def _error(status: int, code: str, message: str) -> Response:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Response(status, body.encode(), {"Content-Type": "application/xml"})
