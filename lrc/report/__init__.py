"""What a run tells a person: terminal tables, differences, one self-contained HTML page."""
