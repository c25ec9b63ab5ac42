//! The interface on a real pseudo-terminal: it opens, waits for its key, and leaves the terminal as it was.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::pty::{Winsize, openpty};

use crate::TOKENIZER;
use crate::fake_shard::{Behaviour, FakeShard};

const ENTER_ALTERNATE_SCREEN: &str = "\u{1b}[?1049h";
const LEAVE_ALTERNATE_SCREEN: &str = "\u{1b}[?1049l";

/// Blank cells are skipped by moving the cursor, so that no text with a space comes as it is shown.
const A_WHOLE_FRAME: &str = "Progress───";

/// The program on a terminal of its own.
struct Terminal {
    child: Child,
    keyboard: File,
    output: Receiver<Vec<u8>>,
    text: String,
    _folder: tempfile::TempDir,
}

impl Terminal {
    fn start(shard: &FakeShard, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), TOKENIZER).unwrap();
        let size = Winsize { ws_row: 45, ws_col: 200, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_benchmark"))
            .env_clear()
            .arg("-t")
            .arg(folder.path())
            .arg("-m")
            .arg(&shard.path)
            .args(arguments)
            .stdin(pty.slave.try_clone().unwrap())
            .stdout(pty.slave)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let keyboard = File::from(pty.master);
        let mut screen = keyboard.try_clone().unwrap();
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // The read fails when the program has closed its end.
            while let Ok(length) = screen.read(&mut buffer) {
                if sender.send(buffer[..length].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { child, keyboard, output, text: String::new(), _folder: folder }
    }

    fn wait_for(&mut self, part: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.text.contains(part) {
            assert!(Instant::now() < deadline, "`{part}` never came in\n{}", self.text);
            if let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(100)) {
                self.text += &String::from_utf8_lossy(&bytes);
            }
        }
    }

    /// Presses `keys` and waits for the end; answers exit code and standard error.
    fn close(&mut self, keys: &[u8]) -> (Option<i32>, String) {
        self.keyboard.write_all(keys).unwrap();
        let status = self.child.wait().unwrap();
        while let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(200)) {
            self.text += &String::from_utf8_lossy(&bytes);
        }
        let mut errors = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        (status.code(), errors)
    }

    fn after_the_interface(&self) -> &str {
        self.text.rsplit_once(LEAVE_ALTERNATE_SCREEN).expect("the terminal is restored").1
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_interface_stays_until_q_and_then_prints_the_tables() {
    let shard = FakeShard::start(Behaviour::default());
    let mut terminal = Terminal::start(&shard, &["-b", "1", "-b", "2", "-r", "3"]);
    terminal.wait_for(ENTER_ALTERNATE_SCREEN);
    terminal.wait_for(A_WHOLE_FRAME);
    while shard.seen.lock().unwrap().prefills.len() < 8 {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(300));
    assert!(terminal.child.try_wait().unwrap().is_none(), "it does not end by itself");
    let (code, errors) = terminal.close(b"\x1b[C+-q");
    assert_eq!(code, Some(0), "{errors}");
    let tables = terminal.after_the_interface();
    assert_eq!(tables.matches("| Step ").count(), 2, "{tables}");
    assert!(!tables.contains("NaN"), "{tables}");
}

#[test]
fn a_failed_run_is_shown_and_then_reported() {
    let shard = FakeShard::start(Behaviour { failing_decode: Some(1), ..Default::default() });
    let mut terminal = Terminal::start(&shard, &["-b", "1"]);
    terminal.wait_for("out of memory");
    let (code, errors) = terminal.close(b"\x03");
    assert_eq!(code, Some(1));
    assert!(
        errors.ends_with("error: decode of batch size 1 failed: Server error: out of memory\n"),
        "{errors}"
    );
    assert!(!terminal.after_the_interface().contains("| Step"), "nothing was measured");
}

#[test]
fn a_run_that_is_quit_ends_well_even_when_the_shard_hangs() {
    let shard = FakeShard::start(Behaviour { hangs: true, ..Default::default() });
    let mut terminal = Terminal::start(&shard, &["-b", "1"]);
    terminal.wait_for(A_WHOLE_FRAME);
    let (code, errors) = terminal.close(b"q");
    assert_eq!(code, Some(0), "{errors}");
    assert!(terminal.after_the_interface().contains("NaN"), "as TGI prints what was not reached");
}
