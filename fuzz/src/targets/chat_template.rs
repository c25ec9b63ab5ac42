//! A chat template and the conversation it renders: the input is the template, and after a zero byte the messages as JSON.

use router::chat_template::ChatTemplate;
use router::types::ChatMessage;

use crate::message::check_line;

/// Where the input has no messages.
const MESSAGES: &str = r#"[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello <b>"},
    {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]"#;
/// Of a thread of the router's runtime.
const STACK_BYTES: usize = 2 << 20;

/// Compiles and renders the template, on a thread with the stack that a router's have.
///
/// # Panics
/// A message of several lines, or an endless prompt.
pub fn run(input: &[u8]) {
    let text = String::from_utf8_lossy(input).into_owned();
    let render = move || {
        let (source, messages) = text.split_once('\0').unwrap_or((text.as_str(), MESSAGES));
        let Ok(messages) = serde_json::from_str::<Vec<ChatMessage>>(messages) else { return };
        let token = |text: &str| Some(text.to_owned());
        let rendered = ChatTemplate::new(source, token("<s>"), token("</s>"))
            .and_then(|template| template.render(&messages));
        let _ = rendered.inspect_err(|error| check_line(error));
    };
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(render).expect("a thread");
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}
