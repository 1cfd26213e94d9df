"""Turn a PEFT folder into the packed form: one buffer that is the same on disk, on the wire and on a device."""
