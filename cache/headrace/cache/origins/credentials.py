"""Credentials for the origins that obstore reads: each cloud's usual chain, renewed on the way.

obstore itself knows the environment's keys, web identities, container and instance roles (AWS),
service accounts and application defaults (Google), and account keys, SAS tokens, service principals
and workload identities (Azure), and renews what expires. What it does not know is added here: AWS
profiles with everything botocore can make of them (SSO, assumed roles, processes), and Google's
federated identities. Those are callbacks that are asked again before what they gave expires, and
whenever the origin refuses it. Nothing found here is written, logged or put into an error.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cache.errors import AccessDenied, MissingDependency, UsageError
from headrace.cache.origins.options import OriginOptions

if TYPE_CHECKING:
    from obstore.store import AzureConfig, GCSCredentialProvider, S3Credential

# How long an answer of botocore's is used. botocore keeps temporary credentials valid for ten more
# minutes at least, and obstore asks again five minutes before what it is told here.
LIFETIME = timedelta(minutes=10)
_NATIVE_GOOGLE = frozenset({"service_account", "authorized_user"})


class ProfileCredentials:
    """AWS credentials through botocore: profiles, SSO, assumed roles, credential processes.

    Each call looks at the files anew unless botocore itself renews what it has, so that keys that
    another program rotates are taken up without a restart.
    """

    def __init__(self, profile: str | None) -> None:
        self._profile = profile
        self._renewing: Any = None

    def __call__(self) -> S3Credential:
        import botocore.credentials
        import botocore.session

        found = self._renewing
        if found is None:
            found = botocore.session.Session(profile=self._profile).get_credentials()
            if found is None:
                raise AccessDenied(
                    "no credentials were found in the AWS configuration files: check AWS_PROFILE."
                )
            if isinstance(found, botocore.credentials.RefreshableCredentials):
                self._renewing = found
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + LIFETIME,
        }

    @property
    def region(self) -> str | None:
        """The region that the configuration files set."""
        import botocore.session

        region: str | None = botocore.session.Session(profile=self._profile).get_config_variable("region")
        return region

    def __repr__(self) -> str:
        return f"ProfileCredentials({self._profile!r})"


def aws(options: OriginOptions, environ: Mapping[str, str] | None = None) -> ProfileCredentials | None:
    """A callback where obstore's own chain would not find what AWS's tools find, else None.

    As in AWS's tools, keys in the environment come before a profile that is named there too.

    Raises:
        MissingDependency: a profile was asked for and botocore is not installed.
        UsageError: there is no such profile.
    """
    env = os.environ if environ is None else environ
    if options.anonymous:
        return None
    installed = importlib.util.find_spec("botocore") is not None
    named = options.profile in (env.get("AWS_PROFILE"), env.get("AWS_DEFAULT_PROFILE"))
    if options.profile is not None and not (named and env.get("AWS_ACCESS_KEY_ID")):
        if not installed:
            raise MissingDependency(
                f"the AWS profile {options.profile!r} needs botocore: pip install 'headrace[s3]'."
            )
        import botocore.session

        if options.profile not in botocore.session.Session().available_profiles:
            raise UsageError(
                f"there is no AWS profile {options.profile!r}: check AWS_PROFILE and ~/.aws/config."
            )
        return ProfileCredentials(options.profile)
    native = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    if any(env.get(name) for name in (*native, "AWS_CONTAINER_CREDENTIALS_FULL_URI")):
        return None
    files = (
        env.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials",
        env.get("AWS_CONFIG_FILE") or "~/.aws/config",
    )
    if installed and any(Path(name).expanduser().is_file() for name in files):
        return ProfileCredentials(None)
    return None


def google(options: OriginOptions, environ: Mapping[str, str] | None = None) -> GCSCredentialProvider | None:
    """A callback through google-auth for kinds of credentials that obstore cannot use, else None.

    Raises:
        MissingDependency: such credentials are configured and google-auth is not installed.
    """
    env = os.environ if environ is None else environ
    if options.anonymous:
        return None
    name = env.get("GOOGLE_APPLICATION_CREDENTIALS")
    file = Path(name or "~/.config/gcloud/application_default_credentials.json").expanduser()
    if not file.is_file():
        return None
    try:
        kind = json.loads(file.read_bytes()).get("type")
    except (ValueError, AttributeError, OSError):
        raise UsageError(
            f"{file} holds no Google credentials: check GOOGLE_APPLICATION_CREDENTIALS."
        ) from None
    if kind is None or kind in _NATIVE_GOOGLE:  # without a type: an emulator's, which obstore reads
        return None
    if importlib.util.find_spec("google") is None or importlib.util.find_spec("google.auth") is None:
        raise MissingDependency(
            f"Google credentials of type {kind!r} need google-auth: pip install 'headrace[gcs]'."
        )
    from obstore.auth.google import GoogleCredentialProvider

    return GoogleCredentialProvider()


def azure(container: str, environ: Mapping[str, str] | None = None) -> tuple[str, AzureConfig]:
    """The container's name and what of the account obstore does not read by itself.

    `container` may be "name@account.dfs.core.windows.net", as in abfss:// URIs. A connection string
    in the environment is taken apart; everything else obstore finds there itself.
    """
    env = os.environ if environ is None else environ
    config: AzureConfig = {}
    text = env.get("AZURE_STORAGE_CONNECTION_STRING")
    if text:
        pairs = (part.partition("=") for part in text.split(";"))
        fields = {name.strip().lower(): value for name, _, value in pairs if value}
        if "accountname" in fields:
            config["account_name"] = fields["accountname"]
        if "accountkey" in fields:
            config["account_key"] = fields["accountkey"]
        if "sharedaccesssignature" in fields:
            config["sas_key"] = fields["sharedaccesssignature"]
        if "blobendpoint" in fields:
            config["endpoint"] = fields["blobendpoint"].rstrip("/")
    name, at, host = container.partition("@")
    if at:
        config["account_name"] = host.partition(".")[0]
    return name, config
