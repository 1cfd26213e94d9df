"""What a coordinator wants kept: known as long as it says so, back when there is room, and told when it comes and goes."""

