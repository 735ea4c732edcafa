// Everything that a page does beyond being read: dark mode, the menu on narrow screens, search, copying code.
// A page is whole without it.
const $ = (q, el = document) => el.querySelector(q), $$ = (q, el = document) => [...el.querySelectorAll(q)]

// Dark mode: what the system says, until the reader says otherwise
const theme = $('.theme'), root = document.documentElement, system = matchMedia('(prefers-color-scheme: dark)')
const dark = () => (root.dataset.theme || (system.matches ? 'dark' : 'light')) === 'dark'
const press = () => theme.setAttribute('aria-pressed', dark())
theme.onclick = () => {
  root.dataset.theme = dark() ? 'light' : 'dark'
  try { localStorage.setItem('theme', root.dataset.theme) } catch (e) {} // storage may be switched off
  press()
}
system.onchange = press
press()

// The side bar, where there is no room beside the text
const menu = $('.menu')
const openMenu = yes => { menu.setAttribute('aria-expanded', yes); document.body.classList.toggle('open', yes) }
menu.onclick = () => openMenu(menu.getAttribute('aria-expanded') !== 'true')
$('#_pages [aria-current]')?.scrollIntoView({block: 'nearest'})

// The contents stand beside the text, or are folded above it
const toc = $('.toc details'), wide = matchMedia('(min-width: 75rem)')
const fold = () => { if (toc) toc.open = wide.matches }
wide.onchange = fold
fold()
const spots = new Map($$('.toc a').map(a => [document.getElementById(decodeURIComponent(a.hash.slice(1))), a]))
const mark = () => {
  let now = null
  for (const [el, a] of spots) { a.removeAttribute('aria-current'); if (el && el.getBoundingClientRect().top < 130) now = a }
  if (!now) return
  now.setAttribute('aria-current', 'true')
  const box = $('.toc'), top = now.offsetTop
  if (wide.matches && (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 40)) box.scrollTop = top - box.clientHeight/2
}
let waiting = false
addEventListener('scroll', () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; mark() }) } }, {passive: true})
mark()

// What is wider than its place can be scrolled with the keys
const reach = () => $$('pre, .scroll, .formula, .long').forEach(el => {
  if (el.scrollWidth > el.clientWidth + 1 || el.scrollHeight > el.clientHeight + 1) el.tabIndex = 0
  else el.removeAttribute('tabindex')
})
addEventListener('resize', reach)
document.addEventListener('toggle', reach, true)
document.fonts.ready.then(reach)

for (const pre of $$('.highlight > pre')) {
  const b = Object.assign(document.createElement('button'), {type: 'button', className: 'copy', textContent: 'Copy'})
  b.onclick = async () => {
    try { await navigator.clipboard.writeText(pre.innerText); b.textContent = 'Copied' } catch (e) { b.textContent = 'Not allowed' }
    setTimeout(() => b.textContent = 'Copy', 1500)
  }
  pre.parentElement.append(b)
}

// Folded code is printed too, and so is what a link leads to
const shown = []
addEventListener('beforeprint', () => $$('main details:not([open])').forEach(d => { d.open = true; shown.push(d) }))
addEventListener('afterprint', () => shown.splice(0).forEach(d => d.open = false))

// Search. The index is a script and not JSON, for a page that was opened from a disk may load the one and not the other.
const form = $('.search'), input = $('input', form), hits = $('.hits', form), list = $('ol', hits), count = $('.count', hits)
let loading
const load = () => loading ||= new Promise((done, failed) => {
  const s = Object.assign(document.createElement('script'), {src: 'search.js', onload: done, onerror: failed})
  document.head.append(s)
})
const clean = s => s.replace(/[&<>"]/g, c => `&#${c.charCodeAt()};`)
const marked = (text, words) => {
  const re = new RegExp(words.map(w => w.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')).join('|'), 'gi')
  let out = '', at = 0
  for (const m of text.matchAll(re)) { out += clean(text.slice(at, m.index)) + '<mark>' + clean(m[0]) + '</mark>'; at = m.index + m[0].length }
  return out + clean(text.slice(at))
}
const score = (s, words) => { // every word must occur; a heading counts more than the text, and the text more than code
  let sum = 0
  for (const w of words) {
    const h = s.low.heading.indexOf(w)
    const here = s.low.heading === w ? 60 : h === 0 ? 30 : h > 0 ? 20 : s.low.title.includes(w) ? 8 : 0
    const found = Math.max(here, s.low.text.includes(w) ? 5 : 0, s.low.code.includes(w) ? 1 : 0)
    if (!found) return 0
    sum += found
  }
  return sum
}
const context = (s, words) => { // the line around the first hit
  const [text, low] = s.low.text.includes(words[0]) || !s.low.code.includes(words[0]) ? [s.text, s.low.text] : [s.code, s.low.code]
  const at = Math.max(0, low.indexOf(words[0])), from = at < 60 ? 0 : text.indexOf(' ', at - 60) + 1
  const cut = from + 150 < text.length, part = text.slice(from, from + 150)
  return (from ? '… ' : '') + marked(cut ? part.replace(/\s\S*$/, '') : part, words) + (cut ? ' …' : '')
}
const search = async () => {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean)
  if (!words.length) { hits.hidden = true; return }
  try { await load() } catch (e) { hits.hidden = false; count.textContent = 'The index could not be loaded'; return }
  for (const s of SEARCH) s.low ||= Object.fromEntries(['title', 'heading', 'text', 'code'].map(k => [k, s[k].toLowerCase()]))
  const found = SEARCH.map(s => [score(s, words), s]).filter(f => f[0]).sort((a, b) => b[0] - a[0])
  count.textContent = found.length === 0 ? 'Nothing found' : found.length === 1 ? 'One place' : `${found.length} places` + (found.length > 20 ? ', the best 20' : '')
  list.innerHTML = found.slice(0, 20).map(([_, s]) => `<li><a href="${s.url}"><span class="where">${clean(s.title)}${s.heading && s.heading !== s.title ? ' › ' + marked(s.heading, words) : ''}</span> <span class="context">${context(s, words)}</span></a></li>`).join('')
  hits.hidden = false
}
let typing
input.oninput = () => { clearTimeout(typing); typing = setTimeout(search, 80) }
input.onfocus = () => { load().catch(() => {}); if (input.value) search() }
form.onsubmit = e => { e.preventDefault(); $('a', list)?.click() }
form.onkeydown = e => {
  const links = $$('a', list), at = links.indexOf(document.activeElement)
  if (e.key === 'Escape') { hits.hidden = true; input.focus() }
  else if (e.key === 'ArrowDown' && links.length && !hits.hidden) links[Math.min(at + 1, links.length - 1)].focus()
  else if (e.key === 'ArrowUp' && at > -1) at ? links[at - 1].focus() : input.focus()
  else return
  e.preventDefault()
}
list.onclick = () => { hits.hidden = true }
document.addEventListener('click', e => { if (!form.contains(e.target)) hits.hidden = true })
document.addEventListener('focusin', e => { if (!form.contains(e.target)) hits.hidden = true })
document.addEventListener('keydown', e => {
  if (e.key === 'Escape' && document.body.classList.contains('open')) { openMenu(false); menu.focus() }
  if (e.key !== '/' || e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName)) return
  e.preventDefault()
  input.focus({preventScroll: true})
})
