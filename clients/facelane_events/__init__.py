"""``facelane-events``: what happens, delivered to MQTT, webhooks, NATS, files and syslog."""

from __future__ import annotations
