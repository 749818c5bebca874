"""A small Alibaba Object Storage Service, as oss2 speaks to it; objects in memory.

Path style (clients use it for IP endpoints), keys percent-encoded with their slashes. Signatures are
not computed, but the access key id and the security token are looked at: `accepted` holds the
(id, token) pairs that are served, None serves everyone.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from dataclasses import dataclass, field
from email.utils import formatdate
from urllib.parse import quote, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from support.http_service import HttpService, Request, Response, serve_bytes

_KEY_ID = re.compile(r"OSS ([^:]+):|Credential=([^/]+)/")


@dataclass(frozen=True, slots=True)
class OssObject:
    data: bytes
    written: int

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data).hexdigest().upper()}"'

    def headers(self) -> dict[str, str]:
        return {
            "ETag": self.etag,
            "Last-Modified": formatdate(self.written, usegmt=True),
            "x-oss-object-type": "Normal",
            "Accept-Ranges": "bytes",
        }


@dataclass(slots=True)
class _Upload:
    name: str
    parts: dict[int, bytes] = field(default_factory=dict)


class FakeOss(HttpService):
    """`objects` is {"bucket/key": OssObject}."""

    def __init__(self, page: int = 3) -> None:
        super().__init__()
        self.objects: dict[str, OssObject] = {}
        self.accepted: set[tuple[str, str | None]] | None = None
        self._page = page
        self._clock = 1_700_000_000
        self._uploads: dict[str, _Upload] = {}

    def put(self, name: str, data: bytes) -> OssObject:
        with self.lock:
            self._clock += 1
            self.objects[name] = OssObject(data, self._clock)
            return self.objects[name]

    def answer(self, request: Request) -> Response:
        response = self._refusal(request) or self._serve(request)
        return Response(
            response.status,
            response.body,
            {"x-oss-request-id": "5E0000000000000000000001", **response.headers},
        )

    def _refusal(self, request: Request) -> Response | None:
        if self.accepted is None:
            return None
        found = _KEY_ID.search(request.headers.get("authorization", ""))
        identity = ((found[1] or found[2]) if found else "", request.headers.get("x-oss-security-token"))
        if identity in self.accepted:
            return None
        if any(identity[0] == key for key, _ in self.accepted):
            return _error(403, "InvalidSecurityToken", "The security token you provided is invalid.")
        return _error(403, "InvalidAccessKeyId", "The OSS Access Key Id you provided does not exist.")

    def _serve(self, request: Request) -> Response:
        name = unquote(request.path).lstrip("/")
        bucket, _, key = name.partition("/")
        query = request.query
        if not key:
            return self._list(bucket, query)
        if request.method in ("GET", "HEAD"):
            return self._get(name, request)
        if request.method == "PUT" and "uploadId" in query:
            upload = self._uploads.get(query["uploadId"])
            if upload is None:
                return _error(404, "NoSuchUpload", "The upload does not exist.")
            upload.parts[int(query["partNumber"])] = request.body
            return Response(200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest().upper()}"'})
        if request.method == "PUT":
            digest = request.headers.get("content-md5")
            if digest and digest != base64.b64encode(hashlib.md5(request.body).digest()).decode():
                return _error(400, "InvalidDigest", "The Content-MD5 you specified is not valid.")
            return Response(200, b"", self.put(name, request.body).headers())
        if request.method == "POST":
            return self._post(bucket, key, name, request)
        if request.method == "DELETE":
            self.objects.pop(name, None)
            return Response(204)
        return _error(405, "MethodNotAllowed", request.method)

    def _get(self, name: str, request: Request) -> Response:
        stored = self.objects.get(name)
        if stored is None:
            return _error(404, "NoSuchKey", "The specified key does not exist.")
        wanted = request.headers.get("if-match")
        if wanted is not None and wanted.strip('"') != stored.etag.strip('"'):
            return _error(412, "PreconditionFailed", "At least one of the pre-conditions did not hold.")
        return serve_bytes(request, stored.data, stored.headers())

    def _list(self, bucket: str, query: dict[str, str]) -> Response:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        second = query.get("list-type") == "2"
        after = query.get("continuation-token" if second else "marker", "") or query.get("start-after", "")
        entries: dict[str, str | None] = {}
        for name in sorted(self.objects):
            if not name.startswith(f"{bucket}/{prefix}"):
                continue
            key = name.partition("/")[2]
            rest = key[len(prefix) :]
            folder = (
                prefix + rest.partition(delimiter)[0] + delimiter if delimiter and delimiter in rest else None
            )
            entries.setdefault(folder or key, None if folder else name)
        left = [(entry, name) for entry, name in sorted(entries.items()) if entry > after]
        page = left[: min(self._page, int(query.get("max-keys") or 1000))]
        more = len(left) > len(page)

        def coded(text: str) -> str:
            return escape(quote(text) if query.get("encoding-type") == "url" else text)

        body = [
            f"<ListBucketResult><Name>{bucket}</Name><Prefix>{coded(prefix)}</Prefix>",
            f"<MaxKeys>{self._page}</MaxKeys><Delimiter>{coded(delimiter)}</Delimiter>",
            "<EncodingType>url</EncodingType>" if query.get("encoding-type") == "url" else "",
            f"<IsTruncated>{str(more).lower()}</IsTruncated>",
        ]
        if second:
            body.append(f"<KeyCount>{len(page)}</KeyCount>")
        if more:
            tag = "NextContinuationToken" if second else "NextMarker"
            body.append(f"<{tag}>{coded(page[-1][0])}</{tag}>")
        for entry, found in page:
            if found is None:
                body.append(f"<CommonPrefixes><Prefix>{coded(entry)}</Prefix></CommonPrefixes>")
                continue
            stored = self.objects[found]
            body.append(
                f"<Contents><Key>{coded(entry)}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
                f"<ETag>{escape(stored.etag)}</ETag><Type>Normal</Type><Size>{len(stored.data)}</Size>"
                "<StorageClass>Standard</StorageClass></Contents>"
            )
        return _xml("".join([*body, "</ListBucketResult>"]))

    def _post(self, bucket: str, key: str, name: str, request: Request) -> Response:
        if "uploads" in request.query:
            upload_id = secrets.token_hex(8)
            self._uploads[upload_id] = _Upload(name)
            return _xml(
                f"<InitiateMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{escape(quote(key))}</Key>"
                f"<EncodingType>url</EncodingType><UploadId>{upload_id}</UploadId></InitiateMultipartUploadResult>"
            )
        upload = self._uploads.pop(request.query["uploadId"], None)
        if upload is None:
            return _error(404, "NoSuchUpload", "The upload does not exist.")
        numbers = [int(e.text or "0") for e in ElementTree.fromstring(request.body).iter("PartNumber")]
        stored = self.put(name, b"".join(upload.parts[number] for number in numbers))
        xml = _xml(
            f"<CompleteMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{escape(quote(key))}</Key>"
            f"<ETag>{escape(stored.etag)}</ETag></CompleteMultipartUploadResult>"
        )
        return Response(200, xml.body, {**xml.headers, "ETag": stored.etag})


def _xml(text: str) -> Response:
    body = f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode()
    return Response(200, body, {"Content-Type": "application/xml"})


def _error(status: int, code: str, message: str) -> Response:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message>'
        "<RequestId>5E0000000000000000000001</RequestId><HostId>127.0.0.1</HostId></Error>"
    )
    return Response(status, body.encode(), {"Content-Type": "application/xml"})
