"""obstore's stores, built from a reference and our options.

obstore's own retries are off: `RetryingOrigin` is the one place for those. Its limit on a whole
request is off as well, for a slow link may need long for a range; what is limited is the time to a
connection and the time without a single byte.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from headrace.cache.errors import UsageError
from headrace.cache.origins import credentials
from headrace.cache.origins.options import OriginOptions
from headrace.cache.reference import Reference

if TYPE_CHECKING:
    from obstore.store import ClientConfig, GCSConfig, RetryConfig, S3Config

Store = S3Store | GCSStore | AzureStore | HTTPStore

_ONE_ATTEMPT: RetryConfig = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}


def build(reference: Reference, options: OriginOptions) -> tuple[Store, bool]:
    """A fresh store for the reference's container, and whether building another may renew credentials.

    Raises:
        UsageError: an option that does not fit.
        MissingDependency: the credentials need a library that is not installed.
    """
    client = _client(reference, options)
    if reference.scheme == "s3":
        return _s3(reference, options, client)
    if reference.scheme == "gs":
        return _gs(reference, options, client)
    if reference.scheme == "az":
        return _az(reference, options, client)
    url = f"{reference.scheme}://{reference.container}"
    return HTTPStore(url, client_options=client, retry_config=_ONE_ATTEMPT), False


def by_url(url: str, options: OriginOptions) -> HTTPStore:
    """A store whose empty path is `url` itself, with its query: a signed URL works."""
    scheme, _, rest = url.partition("://")
    return HTTPStore(url, client_options=_client(Reference(scheme, rest), options), retry_config=_ONE_ATTEMPT)


def _s3(reference: Reference, options: OriginOptions, client: ClientConfig) -> tuple[S3Store, bool]:
    config: S3Config = {"skip_signature": options.anonymous}
    if options.endpoint:
        config["aws_endpoint_url_s3"] = options.endpoint
    provider = credentials.aws(options)
    region = options.region or (provider.region if provider is not None else None)
    if region:
        config["region"] = region
    if options.virtual_hosted is not None:
        config["virtual_hosted_style_request"] = options.virtual_hosted
    if options.requester_pays:
        config["request_payer"] = True
    store = S3Store(
        reference.container,
        config=config,
        client_options=client,
        retry_config=_ONE_ATTEMPT,
        credential_provider=provider,
    )
    return store, provider is not None


def _gs(reference: Reference, options: OriginOptions, client: ClientConfig) -> tuple[GCSStore, bool]:
    config: GCSConfig = {"skip_signature": options.anonymous}
    if options.endpoint:
        config["base_url"] = options.endpoint
    provider = credentials.google(options)
    store = GCSStore(
        reference.container,
        config=config,
        client_options=client,
        retry_config=_ONE_ATTEMPT,
        credential_provider=provider,
    )
    return store, provider is not None


def _az(reference: Reference, options: OriginOptions, client: ClientConfig) -> tuple[AzureStore, bool]:
    container, config = credentials.azure(reference.container)
    if options.anonymous:
        config["skip_signature"] = True
    if options.endpoint:
        config["endpoint"] = options.endpoint
    endpoint = config.get("endpoint") or ""
    if endpoint.startswith("http://"):
        client["allow_http"] = True
    return AzureStore(container, config=config, client_options=client, retry_config=_ONE_ATTEMPT), False


def _client(reference: Reference, options: OriginOptions) -> ClientConfig:
    plain = reference.scheme == "http" or (options.endpoint or "").startswith("http://")
    client: ClientConfig = {
        "allow_http": plain,
        "connect_timeout": timedelta(seconds=options.connect_timeout),
        "read_timeout": timedelta(seconds=max(options.first_byte_timeout, options.stall_timeout)),
        "timeout": timedelta(days=7),
        "user_agent": "headrace",
    }
    if options.ca_bundle and not plain:
        try:
            client["root_certificate"] = Path(options.ca_bundle).read_bytes()
        except OSError as error:
            raise UsageError(
                f"the certificate bundle {options.ca_bundle} cannot be read ({error.strerror}): "
                "check the origin's option `ca_bundle`, AWS_CA_BUNDLE and SSL_CERT_FILE."
            ) from error
    if options.proxy:
        client["proxy_url"] = options.proxy
        if options.no_proxy:
            client["proxy_excludes"] = options.no_proxy
    headers = dict(options.headers)
    if options.requester_pays and reference.scheme == "gs":
        raise UsageError(
            "requester_pays is not available for gs://: name the project to bill in `headers` instead."
        )
    if headers:
        client["default_headers"] = headers
    return client
