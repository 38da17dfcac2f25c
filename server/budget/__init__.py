"""Plans of private runs, before anybody trains, and audits of them by attack."""
