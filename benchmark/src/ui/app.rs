//! What the user looks at: state and keys, no drawing.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

/// Zoom steps in either direction; ten show a third of the range.
const MAX_ZOOM: i32 = 20;

/// What a key asks of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Go on.
    None,
    /// Close the interface.
    Quit,
}

/// The state of the interface.
#[derive(Debug)]
pub(super) struct App {
    num_tabs: usize,
    /// The batch size shown.
    pub(super) tab: usize,
    /// Whether the tab moves along with the run; until the user chooses one.
    is_following: bool,
    /// Steps of magnification of the charts; negative shows more than the data.
    pub(super) zoom: i32,
    /// Why the run failed.
    pub(super) failure: Option<String>,
}

impl App {
    /// The first tab, following the run.
    pub(super) fn new(num_tabs: usize) -> Self {
        Self { num_tabs: num_tabs.max(1), tab: 0, is_following: true, zoom: 0, failure: None }
    }

    /// The run has come to batch size number `batch`.
    pub(super) fn follow(&mut self, batch: usize) {
        if self.is_following {
            self.tab = batch.min(self.num_tabs - 1);
        }
    }

    /// Reacts to a key.
    pub(super) fn press(&mut self, key: KeyEvent) -> Action {
        match key.code {
            KeyCode::Char('q') => return Action::Quit,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Action::Quit,
            KeyCode::Right | KeyCode::Tab => self.turn_to(self.tab + 1),
            KeyCode::Left => self.turn_to(self.tab + self.num_tabs - 1),
            KeyCode::Char('+') => self.zoom = (self.zoom + 1).min(MAX_ZOOM),
            KeyCode::Char('-') => self.zoom = (self.zoom - 1).max(-MAX_ZOOM),
            _ => {}
        }
        Action::None
    }

    fn turn_to(&mut self, tab: usize) {
        self.is_following = false;
        self.tab = tab % self.num_tabs;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn press(app: &mut App, code: KeyCode) -> Action {
        app.press(KeyEvent::new(code, KeyModifiers::NONE))
    }

    #[test]
    fn tabs_wrap_and_stop_following_when_chosen() {
        let mut app = App::new(3);
        app.follow(1);
        assert_eq!(app.tab, 1);
        press(&mut app, KeyCode::Right);
        press(&mut app, KeyCode::Tab);
        assert_eq!(app.tab, 0);
        press(&mut app, KeyCode::Left);
        assert_eq!(app.tab, 2);
        app.follow(0);
        assert_eq!(app.tab, 2);
    }

    #[test]
    fn only_q_and_control_c_quit() {
        let mut app = App::new(1);
        assert_eq!(press(&mut app, KeyCode::Char('q')), Action::Quit);
        assert_eq!(press(&mut app, KeyCode::Char('c')), Action::None);
        assert_eq!(app.press(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)), Action::Quit);
        assert_eq!(press(&mut app, KeyCode::Esc), Action::None);
    }

    #[test]
    fn zoom_has_ends() {
        let mut app = App::new(1);
        for _ in 0..100 {
            press(&mut app, KeyCode::Char('+'));
        }
        assert_eq!(app.zoom, MAX_ZOOM);
        press(&mut app, KeyCode::Char('-'));
        assert_eq!(app.zoom, MAX_ZOOM - 1);
    }
}
