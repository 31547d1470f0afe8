"""Generated from protos/facelane/v1 by `make protos`. Do not edit."""
