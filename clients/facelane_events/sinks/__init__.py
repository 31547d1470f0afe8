"""The ways out, one module each; libraries are imported when a configuration asks for them."""

from __future__ import annotations

from facelane_events import config
from facelane_events.config import ConfigError
from facelane_events.delivery import Sink


def make(settings: config.Sink) -> Sink:
    """Raises ``ConfigError``: a library is not installed, a secret cannot be read."""
    try:
        if isinstance(settings, config.Mqtt):
            from facelane_events.sinks.mqtt import MqttSink

            return MqttSink(settings)
        if isinstance(settings, config.Webhook):
            from facelane_events.sinks.webhook import WebhookSink

            return WebhookSink(settings)
        if isinstance(settings, config.Nats):
            from facelane_events.sinks.nats import NatsSink

            return NatsSink(settings)
        if isinstance(settings, config.JsonLines):
            from facelane_events.sinks.jsonl import JsonLinesSink

            return JsonLinesSink(settings)
        from facelane_events.sinks.syslog import SyslogSink

        return SyslogSink(settings)
    except ImportError as error:
        raise ConfigError(
            f"sink {settings.name}: {error.name} is missing; pip install 'facelane[events]'"
        ) from None
