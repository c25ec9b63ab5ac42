//! The terminal interface: TGI's layout and keys. It stays open until the user closes it, so that the results can be
//! looked at; the program then prints its tables.

mod app;
mod charts;
mod draw;
mod screen;

use std::time::Duration;

use ratatui::crossterm::event::{self, Event as TerminalEvent, KeyEventKind};

use crate::error::BenchmarkError;
use crate::measurements::Measurements;
use crate::session::{Next, Session};
use crate::settings::Settings;

use app::{Action, App};
use screen::Screen;

/// The longest wait for a key, and with it between two looks at the session. TGI redraws 250 times a second; on a
/// machine whose processors are the device that would be part of what is measured.
const TICK: Duration = Duration::from_millis(50);

/// Shows the run until the user quits or a signal arrives.
///
/// # Errors
/// [`BenchmarkError::Terminal`]; a failed run is shown, and is the session's to report.
pub(crate) fn run(
    settings: &Settings,
    session: &mut Session,
    measurements: &mut Measurements,
) -> Result<(), BenchmarkError> {
    let mut screen = Screen::open().map_err(BenchmarkError::Terminal)?;
    let mut app = App::new(measurements.batches.len());
    let mut is_changed = true;
    loop {
        is_changed |= receive(session, measurements, &mut app);
        if is_changed {
            screen
                .draw(|frame| draw::draw(frame, settings, measurements, &app))
                .map_err(BenchmarkError::Terminal)?;
            is_changed = false;
        }
        if !event::poll(TICK).map_err(BenchmarkError::Terminal)? {
            if session.is_stopping() {
                return Ok(());
            }
            continue;
        }
        is_changed = true;
        if let TerminalEvent::Key(key) = event::read().map_err(BenchmarkError::Terminal)?
            && key.kind != KeyEventKind::Release
            && app.press(key) == Action::Quit
        {
            session.quit();
            return Ok(());
        }
    }
}

/// Takes everything the session has to tell without waiting; says whether anything changed on the screen.
fn receive(session: &mut Session, measurements: &mut Measurements, app: &mut App) -> bool {
    let mut is_changed = false;
    loop {
        match session.next(Duration::ZERO) {
            Next::Event(event) => {
                measurements.record(&event);
                app.follow(measurements.current_batch);
                is_changed = true;
            }
            Next::Idle => return is_changed,
            Next::Ended => {
                let failure = session.failure().map(BenchmarkError::to_string);
                is_changed |= app.failure != failure;
                app.failure = failure;
                return is_changed;
            }
        }
    }
}
