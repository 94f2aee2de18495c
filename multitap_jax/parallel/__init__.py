"""How arrays are spread over devices, and how processes find each other."""
