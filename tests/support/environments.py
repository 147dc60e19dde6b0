"""Complete environments of a stage and of a gateway that are never started."""

from typing import cast

from functions.configuration.config import GatewayConfig, read_config

COMMON = {
    "LAMINA_PIPELINE": "0123456789abcdef0123456789abcdef", "LAMINA_PIPELINE_TOKEN": "secret-token", "LAMINA_MODEL": "tiny",
    "LAMINA_DTYPE": "float32", "LAMINA_CUT": "0:2,2:4", "LAMINA_STORE_ENDPOINT": "http://127.0.0.1:9000",
    "LAMINA_STORE_BUCKET": "models", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret-key",
}  # fmt: skip
STAGE = {**COMMON, "LAMINA_ROLE": "stage", "LAMINA_LAYERS": "2:4"}
GATEWAY = {**COMMON, "LAMINA_ROLE": "gateway", "LAMINA_STAGES": "0:2=http://one:81/,2:4=http://two"}


def gateway_config(**more: str) -> GatewayConfig:
    """more: of the gateway's environment."""
    return cast("GatewayConfig", read_config(GATEWAY | more))
