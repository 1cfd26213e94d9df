"""Try spoilt inputs on everything that reads what strangers write: each is served, or refused in its own words."""
