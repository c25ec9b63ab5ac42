//! The terminal in raw mode, on its alternate screen; it is as before when this value is gone, after a panic too.

use ratatui::{DefaultTerminal, Frame};

/// Owns the terminal.
pub(super) struct Screen(DefaultTerminal);

impl Screen {
    /// Switches the terminal over. A panic first switches it back, so that its message can be read.
    pub(super) fn open() -> std::io::Result<Self> {
        ratatui::try_init().map(Self).inspect_err(|_| ratatui::restore())
    }

    /// Draws one frame.
    pub(super) fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> std::io::Result<()> {
        self.0.draw(draw).map(drop)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}
