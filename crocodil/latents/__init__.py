"""What the registers of a text hold: ways between texts, neighbours, and each register's part."""
