'use strict';
const get = id => document.getElementById(id), gallery = get('gallery');
if (gallery) {
  const all = [...gallery.children], number = new Intl.NumberFormat('en-GB');
  const key = {sure: m => -m.dataset.sure, unsure: m => +m.dataset.sure, image: m => +m.dataset.image};
  const show = () => {
    const [is, said, order] = ['is', 'said', 'order'].map(id => get(id).value);
    for (const m of all) m.hidden = is && m.dataset.is !== is || said && m.dataset.said !== said;
    const left = all.filter(m => !m.hidden).length;
    gallery.append(...all.slice().sort((a, b) => key[order](a) - key[order](b)));
    get('count').textContent = number.format(left) + ' of ' + number.format(all.length);
    get('nothing').hidden = left > 0;
  };
  get('controls').addEventListener('change', show);
  get('controls').addEventListener('reset', () => setTimeout(show));
  get('controls').addEventListener('submit', e => e.preventDefault());
  get('controls').hidden = false;
  show();
}
const mark = () => { for (const a of document.querySelectorAll('.confusion a')) a.hash === location.hash ? a.setAttribute('aria-current', 'true') : a.removeAttribute('aria-current'); };
addEventListener('hashchange', mark);
mark();
