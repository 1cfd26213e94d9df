"""tenants holds what each tenant may use and how much of it, and keeps account of that. It knows no door."""
