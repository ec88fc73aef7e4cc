"""The audit: is it gone, or only hidden? One file an attack, each with an `ATTACK` that `suite` runs."""
